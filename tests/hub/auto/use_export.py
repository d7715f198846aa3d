"""Uses an export as someone would who has `transformers` and not this package, offline; prints what it saw as JSON."""

import json
import os
import sys

sys.modules["caduceus"] = None  # any import of it fails
os.environ.update(HF_HUB_OFFLINE="1", HF_HOME=sys.argv[3], TOKENIZERS_PARALLELISM="false")

import torch
import transformers
from safetensors import safe_open
from transformers import (
    AutoModel,
    AutoModelForMaskedLM,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    AutoTokenizer,
    DataCollatorForLanguageModeling,
    Trainer,
    TrainingArguments,
)

folder, golden, out = sys.argv[1], sys.argv[2], sys.argv[4]
with safe_open(golden, "pt") as file:
    input_ids, labels, logits, loss = (file.get_tensor(name) for name in ("input_ids", "labels", "logits", "loss"))
model = AutoModelForMaskedLM.from_pretrained(folder, trust_remote_code=True)
tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=True)
output = model(input_ids, labels=labels)
parameters = list(model.parameters())
seen = {
    "version": transformers.__version__,
    "logits": ((output.logits - logits).abs().max() / logits.abs().max()).item(),
    "loss": abs(output.loss.item() - loss.item()),
    "parameters": sum(parameter.numel() for parameter in parameters),
    "pointers": len({parameter.data_ptr() for parameter in parameters}) == len(parameters),
    "tokens": tokenizer("ACG[MASK]Tn")["input_ids"],
    "modules": type(model).__module__.partition(".")[0],
    "heads": [
        type(auto.from_pretrained(folder, trust_remote_code=True)).__name__
        for auto in (AutoModel, AutoModelForSequenceClassification, AutoModelForTokenClassification)
    ],
}
trainer = Trainer(
    model,
    TrainingArguments(
        out, max_steps=10, per_device_train_batch_size=4, report_to=[], use_cpu=True, disable_tqdm=True, save_steps=10
    ),
    train_dataset=[tokenizer("ACGT" * n) for n in range(4, 24)],
    data_collator=DataCollatorForLanguageModeling(tokenizer, mlm_probability=0.3),
)
seen["trained"] = trainer.train().global_step
trainer.save_model(out)
tokenizer.save_pretrained(out)
again = AutoModelForMaskedLM.from_pretrained(out, trust_remote_code=True)
seen["comes back"] = torch.equal(again(input_ids).logits, model.eval()(input_ids).logits)
print(json.dumps(seen))
