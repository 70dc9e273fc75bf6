"""A Hugging Face hub for tests: models with the published files' own names and tensors but random
weights, as a cache that a download has left, or behind a real HTTP server that can misbehave.
"""

import hashlib
import json
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from safetensors.torch import load, save
from transformers import BertConfig, BertForPreTraining, ViTConfig, ViTForImageClassification

from helpers.storage import hub
from tests.faulty_server import running

VIT, BERT = hub.REVISIONS
WEIGHTS = "model.safetensors"
PRESENT = "7" * 40  # revision of a model that is not pinned
PREPROCESSOR = {"do_normalize": True, "do_resize": True, "size": 224}
PREPROCESSOR |= {"image_mean": [0.5, 0.5, 0.5], "image_std": [0.5, 0.5, 0.5]}


def saved(model) -> dict[str, bytes]:
    """A model's config.json and model.safetensors; biases and gains are random, too."""
    for parameter in model.parameters():
        parameter.data.add_(torch.randn_like(parameter), alpha=0.02)
    with TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        return {name: Path(folder, name).read_bytes() for name in ("config.json", WEIGHTS)}


def published(vocabulary: bytes, **shape) -> dict[str, dict[str, bytes]]:
    """What both models hold on the hub: by model, then by file name.

    The ViT is a ViTForImageClassification, the BERT a BertForPreTraining whose norms have a gamma
    and a beta.
    """
    torch.manual_seed(0)
    vit = saved(ViTForImageClassification(ViTConfig(**shape, num_labels=1000)))
    vit["preprocessor_config.json"] = json.dumps(PREPROCESSOR).encode()
    words = len(vocabulary.splitlines())
    bert = saved(BertForPreTraining(BertConfig(**shape, vocab_size=words)))
    tensors = {}
    for name, tensor in load(bert[WEIGHTS]).items():
        name = name.replace("LayerNorm.weight", "LayerNorm.gamma")
        tensors[name.replace("LayerNorm.bias", "LayerNorm.beta")] = tensor
    bert[WEIGHTS] = save(tensors, {"format": "pt"})
    bert |= {"vocab.txt": vocabulary, "tokenizer_config.json": b'{"do_lower_case": true}'}
    return {VIT: vit, BERT: bert}


def blob(name: str, content: bytes) -> str:
    """A blob's name: SHA-256 where the hub keeps a file in large-file storage, else git's hash."""
    if name.endswith(".safetensors"):
        return hashlib.sha256(content).hexdigest()
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


def write_cache(cache, models: dict[str, dict[str, bytes]]):
    """The folder HF_HUB_CACHE with what downloads leave, without their links between files."""
    for model, files in models.items():
        folder = cache / f"models--{model.replace('/', '--')}"
        snapshot = folder / "snapshots" / hub.REVISIONS[model]
        snapshot.mkdir(parents=True)
        for name, content in files.items():
            (snapshot / name).write_bytes(content)


class Answer(BaseHTTPRequestHandler):
    """The hub's answers about a revision's list of files and about each file."""

    protocol_version = "HTTP/1.1"

    def do_HEAD(self):
        path = self.path.lstrip("/").partition("?")[0]
        self.server.requests.append((self.command, path))
        if isinstance(self.server.fault, tuple):
            return self.reply(*self.server.fault)
        models = [name for name in self.server.models if name in path]
        revision = hub.REVISIONS.get(models[0], PRESENT) if models else None
        if path.endswith("/revision/main") and revision == PRESENT:
            return self.reply(200, {}, json.dumps({"id": models[0], "sha": PRESENT}).encode())
        if not models or revision not in path:
            return self.reply(404, {"X-Error-Code": "RepoNotFound"})
        files = self.server.models[models[0]]
        if path.startswith("api/"):
            rows = [{"type": "file", "path": k, "size": len(v), "oid": k} for k, v in files.items()]
            return self.reply(200, {}, json.dumps(rows).encode())
        name = path.rpartition("/")[2]
        if name not in files:
            return self.reply(404, {"X-Error-Code": "EntryNotFound"})
        content = files[name]
        headers = {"ETag": f'"{blob(name, content)}"', "X-Repo-Commit": revision}
        start = int(self.headers.get("Range", "bytes=0-").removeprefix("bytes=").split("-")[0])
        if start:
            headers["Content-Range"] = f"bytes {start}-{len(content) - 1}/{len(content)}"
        return self.reply(206 if start else 200, headers, content[start:])

    do_GET = do_HEAD

    def reply(self, status, headers, body=b""):
        self.send_response(status)
        for name, value in {**headers, "Content-Length": str(len(body))}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.server.fault == "cut" and len(body) > 1000:
            body = body[: len(body) // 3]
            self.close_connection = True
        if self.command == "GET":
            self.wfile.write(body)

    def log_message(self, *_):
        pass


def serve(models: dict[str, dict[str, bytes]]):
    """Runs the hub with these models, and yields the server.

    server.url; server.requests: (method, path) of each; server.fault: None, or what is wrong,
    either (status, headers) for every answer or "cut" for files that break off in the middle.
    """
    return running(Answer, models=models, fault=None)
