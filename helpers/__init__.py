"""The course's own code: small modules, each readable in one sitting. Start with `helpers.config`."""

from importlib.metadata import version

if int(version("transformers").split(".")[0]) < 5:
    raise ImportError(
        f'transformers {version("transformers")} is too old for this course: pip install "transformers>=5,<6", then '
        "restart the session and begin again."
    )
