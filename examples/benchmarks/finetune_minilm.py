"""Fine-tune the packaged MiniLM-L6 on a task of GLUE, as the dense model of `encoder_glue.py`.

    python examples/benchmarks/finetune_minilm.py TASK DATA OUTPUT [--base BASE] [--epochs 3]

TASK: sst2, stsb or cola. DATA: a folder with train.parquet and dev.parquet. OUTPUT: a new folder. Minutes on two CPU cores.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

from glue import TASKS, read, score
from transformers import AutoModelForSequenceClassification, AutoTokenizer, DataCollatorWithPadding, Trainer, TrainingArguments

sys.path.insert(0, str(Path(__file__).parents[1]))
from demo import dense_model


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("task", choices=TASKS)
    parser.add_argument("data", type=Path)
    parser.add_argument("output", type=Path)
    parser.add_argument("--base", default=dense_model())
    parser.add_argument("--epochs", type=float, default=3)
    parser.add_argument("--learning-rate", type=float, default=1e-4)
    args = parser.parse_args()
    task, (train, dev) = TASKS[args.task], read(args.data)
    tokenizer = AutoTokenizer.from_pretrained(args.base)
    model = AutoModelForSequenceClassification.from_pretrained(args.base, num_labels=task.num_labels)

    def encode(rows: dict[str, Any]) -> dict[str, Any]:
        labels = [float(value) for value in rows[task.label]] if task.num_labels == 1 else rows[task.label]
        return {**tokenizer(*(rows[name] for name in task.columns), truncation=True, max_length=128), "labels": labels}

    arguments = TrainingArguments(
        output_dir=str(args.output),
        num_train_epochs=args.epochs,
        learning_rate=args.learning_rate,
        per_device_train_batch_size=32,
        warmup_steps=100,
        weight_decay=0.01,
        save_strategy="no",
        report_to=[],
        seed=0,
    )
    encoded = train.map(encode, batched=True, remove_columns=train.column_names)
    Trainer(model, arguments, train_dataset=encoded, data_collator=DataCollatorWithPadding(tokenizer)).train()
    model.save_pretrained(args.output)
    tokenizer.save_pretrained(args.output)
    print(f"{args.task}: {task.metric} on dev {score(task, model.eval(), tokenizer, dev):.2f}")


if __name__ == "__main__":
    main()
