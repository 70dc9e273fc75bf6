"""A Hugging Face hub for tests: models with the published files' own names and tensors but random
weights, as a cache that a download has left, or behind a real HTTP server that can misbehave.
"""

import hashlib
import json
import os
import threading
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import torch
from safetensors.torch import save
from transformers import BertConfig, ViTConfig

from helpers.storage import hub

VIT, BERT = hub.REVISIONS
SHAPE = ("hidden_size", "intermediate_size", "num_attention_heads", "num_hidden_layers")
NAMES = {
    VIT: {
        "square": ["attention.attention.query", "attention.attention.key"]
        + ["attention.attention.value", "attention.output.dense"],
        "norms": ["layernorm_before", "layernorm_after"],
    },
    BERT: {
        "square": ["attention.self.query", "attention.self.key", "attention.self.value"]
        + ["attention.output.dense"],
        "norms": ["attention.output.LayerNorm", "output.LayerNorm"],
    },
}


def linear(name, rows, columns):
    return {f"{name}.weight": (rows, columns), f"{name}.bias": (rows,)}


def norm(name, width, gain="weight", bias="bias"):
    return {f"{name}.{gain}": (width,), f"{name}.{bias}": (width,)}


def layers(model, prefix, config, **names):
    """The shapes of all layers; names: how the parameters of norms are called."""
    d, wide, shapes = config.hidden_size, config.intermediate_size, {}
    for i in range(config.num_hidden_layers):
        layer = f"{prefix}.encoder.layer.{i}"
        for name in NAMES[model]["square"]:
            shapes |= linear(f"{layer}.{name}", d, d)
        for name in NAMES[model]["norms"]:
            shapes |= norm(f"{layer}.{name}", d, **names)
        shapes |= linear(f"{layer}.intermediate.dense", wide, d)
        shapes |= linear(f"{layer}.output.dense", d, wide)
    return shapes


def weights(shapes, seed):
    """Random weights as the bytes of a safetensors file; gains are 1."""
    draw = torch.Generator().manual_seed(seed)
    gains = ("gamma", "norm.weight", "before.weight", "after.weight")
    tensors = {
        name: torch.ones(shape)
        if name.endswith(gains)
        else 0.04 * torch.randn(shape, generator=draw)
        for name, shape in shapes.items()
    }
    return save(tensors, {"format": "pt"})


def config_of(config, **entries):
    shape = {name: getattr(config, name) for name in SHAPE}
    return json.dumps({**shape, "layer_norm_eps": 1e-12, "hidden_act": "gelu", **entries}).encode()


def vit_files(config: ViTConfig) -> dict[str, bytes]:
    """What google/vit-base-patch16-224 holds: a ViTForImageClassification, by old names."""
    d, patch, grid = config.hidden_size, config.patch_size, config.image_size // config.patch_size
    shapes = {
        "vit.embeddings.cls_token": (1, 1, d),
        "vit.embeddings.position_embeddings": (1, 1 + grid**2, d),
        "vit.embeddings.patch_embeddings.projection.weight": (d, 3, patch, patch),
        "vit.embeddings.patch_embeddings.projection.bias": (d,),
        **layers(VIT, "vit", config),
        **norm("vit.layernorm", d),
        **linear("classifier", 1000, d),
    }
    sizes = {"image_size": config.image_size, "patch_size": patch, "num_channels": 3}
    labels = {"id2label": {str(k): f"LABEL_{k}" for k in range(1000)}}
    kind = {"model_type": "vit", "architectures": ["ViTForImageClassification"]}
    half = [0.5, 0.5, 0.5]
    image = {"do_normalize": True, "do_resize": True, "size": 224}
    return {
        "config.json": config_of(config, **kind, **sizes, **labels, qkv_bias=True),
        "preprocessor_config.json": json.dumps(
            {**image, "image_mean": half, "image_std": half}
        ).encode(),
        "model.safetensors": weights(shapes, seed=1),
    }


def bert_files(config: BertConfig, vocabulary: bytes) -> dict[str, bytes]:
    """What bert-base-uncased holds: a BertForPreTraining whose norms have a gamma and a beta."""
    d = config.hidden_size
    tensorflow = {"gain": "gamma", "bias": "beta"}
    shapes = {
        "bert.embeddings.word_embeddings.weight": (config.vocab_size, d),
        "bert.embeddings.position_embeddings.weight": (config.max_position_embeddings, d),
        "bert.embeddings.token_type_embeddings.weight": (2, d),
        **norm("bert.embeddings.LayerNorm", d, **tensorflow),
        **layers(BERT, "bert", config, **tensorflow),
        **linear("bert.pooler.dense", d, d),
        **linear("cls.predictions.transform.dense", d, d),
        **norm("cls.predictions.transform.LayerNorm", d, **tensorflow),
        **linear("cls.seq_relationship", 2, d),
    }
    positions = config.max_position_embeddings
    sizes = {"vocab_size": config.vocab_size, "max_position_embeddings": positions}
    kind = {"model_type": "bert", "architectures": ["BertForMaskedLM"], "type_vocab_size": 2}
    return {
        "config.json": config_of(config, **kind, **sizes, pad_token_id=0),
        "vocab.txt": vocabulary,
        "tokenizer_config.json": json.dumps({"do_lower_case": True}).encode(),
        "model.safetensors": weights(shapes, seed=2),
    }


def blob(name: str, content: bytes) -> str:
    """A blob's name: SHA-256 where the hub keeps a file in large-file storage, else git's hash."""
    if name.endswith(".safetensors"):
        return hashlib.sha256(content).hexdigest()
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


def write_cache(cache, models: dict[str, dict[str, bytes]]):
    """The folder HF_HUB_CACHE as downloads leave it: blobs named by hash, and links to them."""
    for model, files in models.items():
        folder = cache / f"models--{model.replace('/', '--')}"
        snapshot = folder / "snapshots" / hub.REVISIONS[model]
        snapshot.mkdir(parents=True)
        (folder / "blobs").mkdir()
        for name, content in files.items():
            (folder / "blobs" / blob(name, content)).write_bytes(content)
            os.symlink(f"../../blobs/{blob(name, content)}", snapshot / name)


@contextmanager
def serve(models: dict[str, dict[str, bytes]]):
    """The hub's answers about a revision's list of files and about each file; yields the server.

    server.url; server.requests: (method, path) of each; server.fault: None, or what is wrong,
    either (status, headers) for every answer or "cut" for files that break off in the middle.
    """

    class Answer(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_HEAD(self):
            path = self.path.lstrip("/").partition("?")[0]
            self.server.requests.append((self.command, path))
            if isinstance(self.server.fault, tuple):
                return self.reply(*self.server.fault, b"")
            model = next((name for name in self.server.models if name in path), None)
            files = self.server.models.get(model, {})
            if model is None or hub.REVISIONS[model] not in path:
                return self.reply(404, {"X-Error-Code": "RepoNotFound"}, b"")
            if path.startswith("api/"):
                rows = [
                    {"type": "file", "path": name, "size": len(content), "oid": blob("", content)}
                    for name, content in files.items()
                ]
                return self.reply(200, {}, json.dumps(rows).encode())
            name = path.rpartition("/")[2]
            if name not in files:
                return self.reply(404, {"X-Error-Code": "EntryNotFound"}, b"")
            content = files[name]
            headers = {"ETag": f'"{blob(name, content)}"', "Accept-Ranges": "bytes"}
            headers["X-Repo-Commit"] = hub.REVISIONS[model]
            start = int(self.headers.get("Range", "bytes=0-").removeprefix("bytes=").split("-")[0])
            if start:
                headers["Content-Range"] = f"bytes {start}-{len(content) - 1}/{len(content)}"
            return self.reply(206 if start else 200, headers, content[start:])

        do_GET = do_HEAD

        def reply(self, status, headers, body):
            self.send_response(status)
            for name, value in {**headers, "Content-Length": str(len(body))}.items():
                self.send_header(name, value)
            self.end_headers()
            if self.command == "GET" and self.server.fault == "cut" and len(body) > 1000:
                self.wfile.write(body[: len(body) // 3])
                self.close_connection = True
            elif self.command == "GET":
                self.wfile.write(body)

        def log_message(self, *_):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Answer)
    server.models, server.requests, server.fault = models, [], None
    server.url = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
