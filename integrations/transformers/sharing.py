"""What stands beside the weights of a saved model, so that whoever opens the folder knows how."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from ..files import read_json

INSTALL = 'pip install "multiscale-retention[transformers]"'
CODE = "retention_model.py"
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
    """Mixed into a config: what it writes names the library, in config.json, in a model card and in a file of code."""

    def file_contents(self, written: dict[str, Any]) -> dict[str, Any]:
        """What stands in config.json instead of what transformers would write."""
        return written

    def to_json_string(self, use_diff: bool = True) -> str:
        contents = self.file_contents(json.loads(super().to_json_string(use_diff)))  # type: ignore[misc]
        contents["auto_map"] = {"AutoConfig": f"{Path(CODE).stem}.Config"}
        return json.dumps(contents, indent=2, sort_keys=True) + "\n"

    def save_pretrained(self, save_directory: str | os.PathLike[str], *args: Any, **kwargs: Any) -> None:
        """Write config.json and, where there are none, a model card and the file that trust_remote_code asks for."""
        super().save_pretrained(save_directory, *args, **kwargs)  # type: ignore[misc]
        folder = Path(save_directory)
        (folder / CODE).write_text(_CODE)
        if not (folder / "README.md").exists():
            (folder / "README.md").write_text(self._card(folder.resolve().name))

    @classmethod
    def _dict_from_json_file(cls, json_file: str | os.PathLike[str]) -> dict[str, Any]:
        """What transformers reads of config.json. Raises: as `read_json`."""
        read_json(Path(json_file))
        return super()._dict_from_json_file(json_file)  # type: ignore[misc]

    @classmethod
    def register_for_auto_class(cls, auto_class: str = "AutoConfig") -> None:
        """Nothing: transformers would copy our files into every folder; the library has them."""

    def _card(self, folder: str) -> str:
        config: Any = self
        architecture = (config.architectures or [""])[0]
        auto = "AutoModelForCausalLM" if architecture.endswith(("CausalLM", "LMHeadModel")) else "AutoModel"
        layers = len(getattr(self, "retention_in_attention", ()))
        what = f"A {config.model_type} model with retention in the place of attention in {layers} layers."
        what = what if layers else "A Retentive Network (RetNet, arXiv:2307.08621)."
        return _CARD.format(name=folder, what=what, auto=auto, folder=folder, install=INSTALL)
