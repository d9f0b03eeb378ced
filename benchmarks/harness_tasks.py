"""Tasks for ``fot eval harness`` where the hub cannot be reached: from TREC's questions and a novel.

    python benchmarks/harness_tasks.py OUT --trec train_5500.label TREC_10.label --novels NOVEL.txt ...
    fot eval harness smollm2-135m-fot --include-path OUT --tasks trec_kind,next_sentence,last_word --limit 100

``trec_kind``: what a question asks for, among six, with examples of the training set before it (``--shots``).
``next_sentence``: which of four sentences of a novel follows three others. ``last_word``: the last word of a sentence,
where it occurs in the four sentences before, as in LAMBADA (arXiv 1606.06031).
"""

import argparse
import json
import random
import re
from pathlib import Path
from typing import Any

KINDS = {"ABBR": "an abbreviation", "DESC": "a description", "ENTY": "a thing", "HUM": "a person", "LOC": "a place",
         "NUM": "a number"}  # fmt: skip
SENTENCE = re.compile(r'(?<!Mr\.)(?<!Mrs\.)(?:(?<=[.!?])|(?<=[.!?]["”]))\s+(?=["“]?[A-Z])')
SHORTEST, LONGEST = 20, 400  # characters of a sentence

Document = dict[str, Any]

TASK = """task: {name}
dataset_path: json
dataset_kwargs:
  data_files: {files}
{splits}
output_type: {kind}
doc_to_text: {text}
doc_to_target: {target}
{choices}metric_list:
  - metric: acc
    aggregation: mean
    higher_is_better: true
  - metric: {metric}
    aggregation: {aggregation}
    higher_is_better: {higher}
metadata:
  version: 1.0
"""


def questions(path: Path) -> list[Document]:
    """Documents of a file in TREC's form."""
    lines = [line.partition(" ") for line in path.read_text("latin-1").splitlines() if line.strip()]
    kinds = list(KINDS)
    return [{"question": text.strip(), "label": kinds.index(label.partition(":")[0])} for label, _, text in lines]


def passages(path: Path) -> list[list[str]]:
    """Five sentences of a novel, one after another, all of middling length; no sentence is in two passages."""
    text = SENTENCE.split(" ".join(path.read_text("utf-8").split()))
    groups = [text[start : start + 5] for start in range(0, len(text) - 4, 5)]
    return [group for group in groups if all(SHORTEST <= len(sentence) <= LONGEST for sentence in group)]


def next_sentences(groups: list[list[str]], draw: random.Random) -> list[Document]:
    """Three sentences, and four of which one goes on; the others are from elsewhere."""
    documents = []
    for number, group in enumerate(groups):
        others = draw.sample([each[3] for other, each in enumerate(groups) if other != number], 3)
        label = draw.randrange(4)
        choices = [*others[:label], group[3], *others[label:]]
        documents.append({"context": " ".join(group[:3]), "choices": choices, "label": label})
    return documents


def last_words(groups: list[list[str]]) -> list[Document]:
    """Five sentences without the last word, where the passage has it before."""
    documents = []
    for group in groups:
        *before, word = re.sub(r'[.!?"”]+$', "", group[4]).rsplit(" ", 1)
        context = " ".join([*group[:4], *before])
        if before and len(word) > 3 and word.isalpha() and re.search(rf"\b{word}\b", context):
            documents.append({"context": context, "word": word})
    return documents


def write(folder: Path, name: str, splits: dict[str, list[Document]], **fields: str) -> None:
    """A task and its data."""
    files = {}
    for split, documents in splits.items():
        path = folder / f"{name}.{split}.jsonl"
        path.write_text("".join(json.dumps(document, ensure_ascii=False) + "\n" for document in documents), "utf-8")
        files[split] = str(path.absolute())
    named = {"train": "training_split: train\nfewshot_split: train", "test": "test_split: test"}
    shown = "\n".join(named[split] for split in splits)
    (folder / f"{name}.yaml").write_text(
        TASK.format(name=name, files=json.dumps(files), splits=shown, **fields), "utf-8"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--trec", type=Path, nargs=2, metavar=("TRAIN", "TEST"))
    parser.add_argument("--novels", type=Path, nargs="+", metavar="NOVEL")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    draw = random.Random(0)
    chosen = {"kind": "multiple_choice", "target": '"{{label}}"', "metric": "acc_norm", "aggregation": "mean",
              "higher": "true"}  # fmt: skip
    if args.trec:
        choices = f"doc_to_choice: {json.dumps(list(KINDS.values()))}\n"
        text = '"Question: {{question}}\\nAsks for:"'
        splits = {"train": questions(args.trec[0]), "test": questions(args.trec[1])}
        write(args.out, "trec_kind", splits, text=text, choices=choices, **chosen)
    if args.novels:
        groups = [group for novel in args.novels for group in passages(novel)]
        draw.shuffle(groups)
        documents = next_sentences(groups, draw)
        choices = 'doc_to_choice: "{{choices}}"\n'
        write(args.out, "next_sentence", {"test": documents}, text='"{{context}}"', choices=choices, **chosen)
        words = {"kind": "loglikelihood", "target": '" {{word}}"', "metric": "perplexity", "aggregation": "perplexity",
                 "higher": "false"}  # fmt: skip
        write(args.out, "last_word", {"test": last_words(groups)}, text='"{{context}}"', choices="", **words)


if __name__ == "__main__":
    main()
