"""An upload as the browser hands it over, to ipywidgets 7 or 8."""

import datetime

import ipywidgets


def send(control: ipywidgets.FileUpload, name: str, content: bytes) -> None:
    """Puts a file into a FileUpload, whose value is read-only in ipywidgets 7."""
    if ipywidgets.__version__.startswith("7."):
        control.metadata, control.data = [{"name": name}], [content]
        control._counter += 1
    else:
        now = datetime.datetime(2020, 1, 1, tzinfo=datetime.timezone.utc)
        file = {"name": name, "type": "image/jpeg", "size": len(content), "last_modified": now}
        control.value = ({**file, "content": memoryview(content)},)
