"""Writes the files beside a saved model's weights that tell how to load the model."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard

from ..files import read_json

__all__ = ["CODE", "INSTALL", "SaysHowToLoad"]

INSTALL = 'pip install "multiscale-retention[transformers]"'
CODE = "retention_model.py"
_CARD_FILE = "README.md"
_GENERATED = "This model card has been automatically generated."  # by transformers, which knows nothing of the model
_CODE = f'''"""What trust_remote_code=True runs: the code of this model is in the library multiscale-retention."""

try:
    from retention.integrations.transformers.remote import Config
except ImportError as error:
    raise ImportError('this model needs the library multiscale-retention: {INSTALL}') from error
'''
_CARD = """---
library_name: transformers
tags:
- retention
---

# {name}

{what} Install the library that has its code, and import it once before the model is loaded:

```bash
{install}
```

```python
import retention.integrations.transformers
from transformers import {auto}

model = {auto}.from_pretrained("{folder}")
```

`{auto}.from_pretrained("{folder}", trust_remote_code=True)` does without the import.
"""


class SaysHowToLoad:
    """Mixin of a config that names this library in config.json, in a model card and in a code file."""

    def file_contents(self, written: dict[str, Any]) -> dict[str, Any]:
        """Return the contents of config.json, given those that transformers would write."""
        return written

    def to_json_string(self, use_diff: bool = True) -> str:
        """Return the text of config.json."""
        contents = self.file_contents(json.loads(super().to_json_string(use_diff)))  # type: ignore[misc]
        contents["auto_map"] = {"AutoConfig": f"{Path(CODE).stem}.Config"}
        return json.dumps(contents, indent=2, sort_keys=True) + "\n"

    def save_pretrained(self, save_directory: str | os.PathLike[str], *args: Any, **kwargs: Any) -> None:
        """Write config.json, the code file for trust_remote_code and, if there is none yet, a model card."""
        super().save_pretrained(save_directory, *args, **kwargs)  # type: ignore[misc]
        folder = Path(save_directory)
        (folder / CODE).write_text(_CODE)
        if not (folder / _CARD_FILE).exists():
            (folder / _CARD_FILE).write_text(self._card(folder.resolve().name))

    def _upload_modified_files(self, working_dir: Any, repo_id: Any, *args: Any, **options: Any) -> Any:
        """Upload a saved folder to the hub; `push_to_hub` of transformers calls it for configs and models.

        The model card that transformers generates for a new repository is replaced by one that tells how to load the
        model. A card that a user wrote stays.
        """
        file = Path(working_dir, _CARD_FILE)
        card = ModelCard(file.read_text(encoding="utf-8") if file.exists() else _GENERATED)
        if _GENERATED in card.content:
            ours = ModelCard(self._card(repo_id))
            data: Any = ours.data
            data.tags = list(dict.fromkeys([*data.tags, *(card.data.to_dict().get("tags") or [])]))
            ours.save(file)
        options["commit_message"] = options.get("commit_message") or "Upload model"
        return super()._upload_modified_files(working_dir, repo_id, *args, **options)  # type: ignore[misc]

    @classmethod
    def _dict_from_json_file(cls, json_file: str | os.PathLike[str]) -> dict[str, Any]:
        """Check config.json by `read_json` before transformers reads it."""
        read_json(Path(json_file))
        return super()._dict_from_json_file(json_file)  # type: ignore[misc]

    @classmethod
    def register_for_auto_class(cls, auto_class: str = "AutoConfig") -> None:
        """Do nothing: transformers would copy this library's files into every folder."""

    def _card(self, folder: str) -> str:
        config: Any = self
        architecture = (config.architectures or [""])[0]
        auto = "AutoModelForCausalLM" if architecture.endswith(("CausalLM", "LMHeadModel")) else "AutoModel"
        layers = len(getattr(self, "retention_in_attention", ()))
        what = f"A {config.model_type} model with retention in the place of attention in {layers} layers."
        what = what if layers else "A Retentive Network (RetNet, arXiv:2307.08621)."
        return _CARD.format(name=folder, what=what, auto=auto, folder=folder, install=INSTALL)
