"""Clients of the server that are too large for the dev extra: ``pip install langchain-openai``.

Slow, as loading them takes seconds; what they ask of the server, the client of OpenAI asks in test_serve.py.
"""

from pathlib import Path

import pytest
from serve_helpers import make_library, make_model, running
from transformers import PreTrainedTokenizerFast

from fot.serve.server import Settings


@pytest.mark.slow
def test_langchain(tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    """Whole and in a stream; passages, which it does not know, do no harm."""
    langchain = pytest.importorskip("langchain_openai")
    library = make_library(make_model(tokenizer), tmp_path)
    entry = library["emma"]
    wanted = entry.blank.anew().say("Who is the vicar?", max_new_tokens=12)
    assert wanted.passages
    with running(library, Settings(api_key="secret", max_tokens=12)) as (url, _):
        model = langchain.ChatOpenAI(base_url=f"{url}/v1", api_key="secret", model="emma", stream_usage=True)
        whole = model.invoke("Who is the vicar?")
        assert whole.text == wanted.text
        assert whole.usage_metadata["input_token_details"]["cache_read"] == entry.tokens
        pieces = list(model.stream("Who is the vicar?"))
        assert len(pieces) > 2
        assert "".join(piece.text for piece in pieces) == wanted.text
        joined = sum(pieces[1:], pieces[0])
        assert joined.usage_metadata["output_tokens"] == wanted.answer_tokens
        again = model.invoke([("human", "Who is the vicar?"), ("ai", wanted.text), ("human", "And when is tea?")])
        other = entry.blank.anew()
        other.say("Who is the vicar?", max_new_tokens=12)
        assert again.text == other.say("And when is tea?", max_new_tokens=12).text
        text = langchain.OpenAI(base_url=f"{url}/v1", api_key="secret", model="emma", max_tokens=5, temperature=0)
        assert text.invoke("The vicar of") == "".join(text.stream("The vicar of"))
