"""The course's own code: small modules, each read in one sitting. Start with `helpers.config`."""

from importlib.metadata import version

installed = version("transformers")
# Older ones do not lowercase what BERT reads, or name a ViT's weights otherwise.
if tuple(map(int, installed.split(".")[:2])) < (5, 9):
    raise ImportError(
        f"transformers {installed} is too old for this course: pip install "
        '"transformers>=5.9,<6", then restart the session and begin again.'
    )
