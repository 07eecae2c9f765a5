"""The model card that a folder saved by transformers gets."""

from pathlib import Path

from retentive.io.atomic import write_text
from retentive.models.language_model import LanguageModel

CARD = """---
library_name: transformers
pipeline_tag: text-generation
tags: [retnet, retentive]
---

# {name}

A {kind} of {parameters:.3g} million parameters, in the format of the package `retentive`.

    pip install "retentive[hf]"

```python
import retentive.hf  # registers the model with transformers
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained("{name}")
tokenizer = AutoTokenizer.from_pretrained("{name}")
inputs = tokenizer("Once upon a time", return_tensors="pt")
print(tokenizer.decode(model.generate(**inputs, max_new_tokens=50)[0]))
```

If flash-linear-attention has models of this kind, `retentive convert --to fla` makes of this folder
one that opens there without `retentive`; if not, it says which fields are in the way.
"""


def write_card(folder: Path, model: LanguageModel) -> None:
    """How to open the folder, as its README.md; one that is there already stays."""
    path = folder / "README.md"
    if not path.exists():
        millions = model.num_parameters() / 1e6
        kind = type(model).__name__
        write_text(path, CARD.format(name=folder.name, kind=kind, parameters=millions))
