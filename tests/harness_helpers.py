"""Tiny tasks of the lm-evaluation-harness."""

import json
from pathlib import Path

DOCUMENTS = [
    {"context": f"{name} keeps a {pet} in the {place}. Nobody has seen it, but everybody has heard it. Her pet is a",
     "choices": choices, "label": label, "word": pet}
    for name, pet, place, choices, label in [
        ("Anna", "fox", "garden", ["fox", "cow"], 0),
        ("Boris", "cow", "kitchen", ["fox", "cow"], 1),
        ("Clara", "hen", "cellar", ["hen", "rat"], 0),
        ("David", "rat", "attic", ["hen", "rat"], 1),
    ]
]  # fmt: skip

TASK = """task: {name}
dataset_path: json
dataset_kwargs:
  data_files: {{"test": {path}}}
test_split: test
output_type: {kind}
doc_to_text: "{{{{context}}}}"
doc_to_target: {target}
{more}
metadata:
  version: 1.0
"""
CHOICE = """doc_to_choice: "{{choices}}"
metric_list:
  - metric: acc
  - metric: acc_norm"""
WORD = """metric_list:
  - metric: acc
  - metric: perplexity"""
ANSWER = """generation_kwargs:
  until: ["."]
  max_gen_toks: 4
metric_list:
  - metric: exact_match"""


def write_tasks(folder: Path) -> Path:
    """The tasks ``tiny_choice``, ``tiny_word`` and ``tiny_answer``, with their documents."""
    data = folder / "documents.jsonl"
    data.write_text("".join(json.dumps(document) + "\n" for document in DOCUMENTS), "utf-8")
    for name, kind, target, more in (
        ("tiny_choice", "multiple_choice", '"{{label}}"', CHOICE),
        ("tiny_word", "loglikelihood", '" {{word}}"', WORD),
        ("tiny_answer", "generate_until", '" {{word}}"', ANSWER),
    ):
        text = TASK.format(name=name, path=json.dumps(str(data)), kind=kind, target=target, more=more)
        (folder / f"{name}.yaml").write_text(text, "utf-8")
    return folder
