"""What goes into a widget and comes out: uploads, for ipywidgets 7 or 8, and images."""

import datetime
import io

import ipywidgets
from PIL import Image


def send(control: ipywidgets.FileUpload, name: str, content: bytes) -> None:
    """Puts a file into a FileUpload, whose value is read-only in ipywidgets 7."""
    if ipywidgets.__version__.startswith("7."):
        control.metadata, control.data = [{"name": name}], [content]
        control._counter += 1
    else:
        now = datetime.datetime(2020, 1, 1, tzinfo=datetime.timezone.utc)
        file = {"name": name, "type": "image/jpeg", "size": len(content), "last_modified": now}
        control.value = ({**file, "content": memoryview(content)},)


def shown(widget) -> bytes:
    """The bytes of the widget's image, once it is sure that they are a PNG."""
    assert widget.message.value == ""
    with Image.open(io.BytesIO(widget.image.value)) as image:
        image.load()
        assert image.format == "PNG"
    return widget.image.value
