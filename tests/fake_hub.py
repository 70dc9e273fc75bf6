"""A Hugging Face hub for tests: models with the published files' own names and tensors but random weights, as a cache
that a download has left, or behind a real HTTP server that can misbehave.
"""

import hashlib
import json
import math
import os
import threading
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import torch
from safetensors.torch import save
from transformers import BertConfig, ViTConfig

from helpers.storage import hub

VIT, BERT, MINILM = hub.REVISIONS


def tensors(shapes, seed):
    """Random weights by name; gains are 1."""
    draw = torch.Generator().manual_seed(seed)
    return {
        name: torch.ones(shape)
        if name.endswith(("gamma", "norm.weight", "before.weight", "after.weight"))
        else 0.04 * torch.randn(shape, generator=draw)
        for name, shape in shapes.items()
    }


def vit_files(config: ViTConfig) -> dict[str, bytes]:
    """What google/vit-base-patch16-224 holds: a ViTForImageClassification, named as transformers 4 names its parts."""
    d, wide, grid = (
        config.hidden_size,
        config.intermediate_size,
        config.image_size // config.patch_size,
    )
    shapes = {
        "vit.embeddings.cls_token": (1, 1, d),
        "vit.embeddings.position_embeddings": (1, 1 + grid**2, d),
        "vit.embeddings.patch_embeddings.projection.weight": (
            d,
            3,
            config.patch_size,
            config.patch_size,
        ),
        "vit.embeddings.patch_embeddings.projection.bias": (d,),
    }
    for i in range(config.num_hidden_layers):
        linear = {f"attention.attention.{name}": (d, d) for name in ("query", "key", "value")}
        linear |= {
            "attention.output.dense": (d, d),
            "intermediate.dense": (wide, d),
            "output.dense": (d, wide),
        }
        for name, shape in {**linear, "layernorm_before": (d,), "layernorm_after": (d,)}.items():
            shapes[f"vit.encoder.layer.{i}.{name}.weight"] = shape
            shapes[f"vit.encoder.layer.{i}.{name}.bias"] = shape[:1]
    shapes |= {"vit.layernorm.weight": (d,), "vit.layernorm.bias": (d,)}
    shapes |= {"classifier.weight": (1000, d), "classifier.bias": (1000,)}
    told = {
        "architectures": ["ViTForImageClassification"],
        "attention_probs_dropout_prob": 0.0,
        "encoder_stride": 16,
        "hidden_act": "gelu",
        "hidden_dropout_prob": 0.0,
        "hidden_size": d,
        "image_size": config.image_size,
        "initializer_range": 0.02,
        "intermediate_size": wide,
        "layer_norm_eps": 1e-12,
        "model_type": "vit",
        "num_attention_heads": config.num_attention_heads,
        "num_channels": 3,
        "num_hidden_layers": config.num_hidden_layers,
        "patch_size": config.patch_size,
        "qkv_bias": True,
        "id2label": {str(k): f"LABEL_{k}" for k in range(1000)},
        "transformers_version": "4.13.0.dev0",
    }
    half = [0.5, 0.5, 0.5]
    picture = {
        "do_normalize": True,
        "do_resize": True,
        "image_mean": half,
        "image_std": half,
        "size": 224,
    }
    return {
        "config.json": json.dumps(told).encode(),
        "preprocessor_config.json": json.dumps(picture).encode(),
        "model.safetensors": save(tensors(shapes, seed=1), {"format": "pt"}),
    }


def bert_files(config: BertConfig, vocabulary: bytes) -> dict[str, bytes]:
    """What bert-base-uncased holds: a BertForPreTraining whose norms have a gamma and a beta, as TensorFlow's had."""
    d, wide = config.hidden_size, config.intermediate_size
    shapes = {
        "bert.embeddings.word_embeddings.weight": (config.vocab_size, d),
        "bert.embeddings.position_embeddings.weight": (config.max_position_embeddings, d),
        "bert.embeddings.token_type_embeddings.weight": (2, d),
    }
    linear, norms = (
        {"bert.pooler.dense": (d, d), "cls.predictions.transform.dense": (d, d)},
        ["bert.embeddings"],
    )
    for i in range(config.num_hidden_layers):
        layer = f"bert.encoder.layer.{i}"
        linear |= {f"{layer}.attention.self.{name}": (d, d) for name in ("query", "key", "value")}
        linear |= {
            f"{layer}.attention.output.dense": (d, d),
            f"{layer}.intermediate.dense": (wide, d),
        }
        linear |= {f"{layer}.output.dense": (d, wide)}
        norms += [f"{layer}.attention.output", f"{layer}.output"]
    for name, shape in {**linear, "cls.seq_relationship": (2, d)}.items():
        shapes |= {f"{name}.weight": shape, f"{name}.bias": shape[:1]}
    for name in [*norms, "cls.predictions.transform"]:
        shapes |= {f"{name}.LayerNorm.gamma": (d,), f"{name}.LayerNorm.beta": (d,)}
    told = {
        "architectures": ["BertForMaskedLM"],
        "attention_probs_dropout_prob": 0.1,
        "gradient_checkpointing": False,
        "hidden_act": "gelu",
        "hidden_dropout_prob": 0.1,
        "hidden_size": d,
        "initializer_range": 0.02,
        "intermediate_size": wide,
        "layer_norm_eps": 1e-12,
        "max_position_embeddings": config.max_position_embeddings,
        "model_type": "bert",
        "num_attention_heads": config.num_attention_heads,
        "num_hidden_layers": config.num_hidden_layers,
        "pad_token_id": 0,
        "position_embedding_type": "absolute",
        "transformers_version": "4.6.0.dev0",
        "type_vocab_size": 2,
        "use_cache": True,
        "vocab_size": config.vocab_size,
    }
    return {
        "config.json": json.dumps(told).encode(),
        "vocab.txt": vocabulary,
        "tokenizer_config.json": json.dumps(
            {"do_lower_case": True, "model_max_length": 512}
        ).encode(),
        "model.safetensors": save(tensors(shapes, seed=2), {"format": "pt"}),
    }


def etag(name: str, content: bytes) -> str:
    """The name of a blob: SHA-256 where the hub keeps a file in large-file storage, else git's hash."""
    if name.endswith(".safetensors"):
        return hashlib.sha256(content).hexdigest()
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


def write_cache(cache, models: dict[str, dict[str, bytes]]):
    """The folder HF_HUB_CACHE as downloads leave it: blobs named by hash, and links to them by revision."""
    for model, files in models.items():
        folder = cache / f"models--{model.replace('/', '--')}"
        snapshot = folder / "snapshots" / hub.REVISIONS[model]
        snapshot.mkdir(parents=True)
        (folder / "blobs").mkdir()
        for name, content in files.items():
            (folder / "blobs" / etag(name, content)).write_bytes(content)
            os.symlink(f"../../blobs/{etag(name, content)}", snapshot / name)


@contextmanager
def serve(models: dict[str, dict[str, bytes]]):
    """The hub's answers to HEAD and GET of /<model>/resolve/<revision>/<file>; yields the server.

    server.url; server.asked: (method, path, token) of each file asked for; server.fault: None, or what is wrong, either
    (status, headers) for every answer or "cut" for connections that break in the middle of a file.
    """

    class Answer(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_HEAD(self):
            model, _, rest = self.path.lstrip("/").partition("/resolve/")
            revision, _, name = rest.partition("/")
            if name:  # and no call of the client's own, such as for statistics
                self.server.asked.append(
                    (self.command, self.path, self.headers.get("Authorization"))
                )
            content = self.server.models.get(model, {}).get(name)
            status, headers = (
                self.server.fault if isinstance(self.server.fault, tuple) else (None, {})
            )
            if status is None and (content is None or revision != hub.REVISIONS[model]):
                code = "EntryNotFound" if model in self.server.models else "RepoNotFound"
                status, headers = 404, {"X-Error-Code": code, "X-Repo-Commit": revision}
            if status is not None:
                return self.reply(status, headers, b"")
            start = 0
            if (asked := self.headers.get("Range")) is not None:
                start = int(asked.removeprefix("bytes=").split("-")[0])
                headers["Content-Range"] = f"bytes {start}-{len(content) - 1}/{len(content)}"
            headers |= {
                "ETag": f'"{etag(name, content)}"',
                "X-Repo-Commit": revision,
                "Accept-Ranges": "bytes",
            }
            return self.reply(206 if start else 200, headers, content[start:])

        do_GET = do_HEAD

        def reply(self, status, headers, body):
            self.send_response(status)
            for name, value in {**headers, "Content-Length": str(len(body))}.items():
                self.send_header(name, value)
            self.end_headers()
            if self.command == "GET" and self.server.fault == "cut" and len(body) > 1000:
                self.wfile.write(body[: math.ceil(len(body) / 3)])
                self.close_connection = True
            elif self.command == "GET":
                self.wfile.write(body)

        def log_message(self, *_):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Answer)
    server.models, server.asked, server.fault = models, [], None
    server.url = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
