"""A server of tiny models, in this process or on a port."""

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import uvicorn
from chat_templates import TEMPLATES
from conftest import SHAPE
from tokenizers import AddedToken
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedTokenizerFast, set_seed

import fot
from fot.serve.app import create_app
from fot.serve.library import Library, OnDisk
from fot.serve.server import Settings

TEXTS = {
    "books/emma.txt": "The vicar of Highbury is Mr Elton. Tea is at five in the garden.\n" * 12,
    "books/other.txt": "A ship left the harbour at dawn, and nobody saw it again.\n" * 12,
}


def make_model(tokenizer: PreTrainedTokenizerFast, window: int = 256, seed: int = 0) -> Any:
    """A tiny model that chats in ChatML, byte by byte."""
    import copy

    template, end, marks = TEMPLATES["chatml"]
    made = copy.deepcopy(tokenizer)
    made.add_special_tokens({"additional_special_tokens": [*marks, end]})
    made.add_tokens([AddedToken("th", normalized=False)])
    made.eos_token, made.chat_template = end, template
    set_seed(seed)
    config = LlamaConfig(**SHAPE | {"max_position_embeddings": 4096, "num_hidden_layers": 3})
    plain = AutoModelForCausalLM.from_config(config).eval()
    model = fot.attach_memory(plain, fot.MemoryConfig(mem_layers=(1, 2), local_context=window, index="exact"))
    model.tokenizer, model.loaded_as = made, "/somewhere/secret/tiny"
    return model


def make_library(model: Any, folder: Path) -> Library:
    """The memories ``emma`` (of files with absolute names) and ``empty``, and the model ``tiny`` alone."""
    library = Library()
    memory = model.new_memory()
    for name, text in TEXTS.items():
        model.ingest(text, memory, source=f"/home/somebody/{name}")
    memory.save(folder / "emma.memory")
    model.new_memory().save(folder / "empty")
    for name, place in (("emma", OnDisk(folder / "emma.memory")), ("empty", OnDisk(folder / "empty"))):
        library.add(name, model, place.open(), place)
    library.add("tiny", model, None)
    return library


@contextmanager
def running(library: Library, settings: Settings | None = None) -> Iterator[tuple[str, Any]]:
    """The address of a real server, and its application."""
    app = create_app(library, settings)
    server = uvicorn.Server(uvicorn.Config(app, host="127.0.0.1", port=0, log_level="error"))
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    try:
        while not server.started:
            time.sleep(0.01)
        port = server.servers[0].sockets[0].getsockname()[1]
        yield f"http://127.0.0.1:{port}", app
    finally:
        server.should_exit = True
        thread.join(30)
