"""One run in one directory: its flags, files, checkpoints, signals and exit code.

flags.py        RunConfig, the flags of all training scripts; parse; config.json
checks.py       checks of the flags, before anything is loaded
adapters.py     where the adapter of a model is, and the model with it
pretrained.py   loads the model that --model names
lora.py         the flags of LoRA, and the model that a run with them starts from
bucket.py       directories of checkpoints in Cloud Storage
manifest.py     checksums of a checkpoint's files
shared.py       a directory that all hosts see and that one run locks
checkpoint.py   atomic, asynchronous checkpoints
resume.py       chooses the checkpoint from which a run continues
card.py         the run's part of an export's model card
log.py          metrics.jsonl and samples.jsonl as files that a resumed run continues
metrics.py      metrics.jsonl, samples.jsonl, the progress line
watchdog.py     reports a run without progress, and ends it
memory.py       the peak of memory by phase; advice if memory runs out
process.py      signals, memory and the lock on the run directory
average.py      the average of the weights of several language models
run.py          Run: restore, steps, log, save, finish; main: exit codes
"""

from instructjax.run.flags import RunConfig, parse
from instructjax.run.run import FAILED, FINISHED, RESUMABLE, Run, main
from instructjax.usage import USAGE

__all__ = ["FAILED", "FINISHED", "RESUMABLE", "USAGE", "Run", "RunConfig", "main", "parse"]
