"""The latest and the best checkpoints of a run, written in the background, whole or not at all."""

import itertools
import os
import shutil
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal

import jax
import orbax.checkpoint as ocp
from etils import epath
from orbax.checkpoint.checkpoint_managers import AnyPreservationPolicy, BestN, LatestN

from instructjax import hosts
from instructjax.run import bucket, manifest
from instructjax.run.shared import Claim, check_shared


class Checkpoints:
    """The checkpoints in a directory, each named by its step: the number of updates made.

    On a disk a checkpoint gets its name by a rename, once it is complete with its checksums; in
    Cloud Storage a last object completes it. A checkpoint that a killed process left half-written
    is never seen, and is removed here. So only one process, or one group of hosts, may train in a
    directory.

    Args:
      directory: made if it does not exist. Several hosts need one that all of them see.
      keep_last: how many of the latest checkpoints to keep.
      best_metric: the metric that `meta["score"]` is. If given, the best checkpoint is kept too.
        Scores are stored under this name; scores stored under another name are not compared.
      best_mode: whether the least or the greatest score is the best.
      say: gets a line about each damaged checkpoint.
      on_written: gets the step of each checkpoint that this object has written, some time later.

    Raises:
      OSError: not all hosts see the same directory, or the bucket can't be used.
    """

    def __init__(
        self,
        directory: os.PathLike[str] | str,
        keep_last: int,
        best_metric: str | None = None,
        best_mode: Literal["min", "max"] = "min",
        say: Callable[[str], None] = print,
        on_written: Callable[[int], None] = lambda step: None,
    ):
        self._say, self._on_written, self._writing = say, on_written, None
        self._on_disk = "://" not in os.fspath(directory)
        self.directory = epath.Path(Path(directory).absolute() if self._on_disk else directory)
        self.best_metric = best_metric
        self._kept = keep_last + (best_metric is not None)
        worst = float("inf") if best_mode == "min" else -float("inf")

        def score(metrics: Mapping[str, float]) -> float:
            return metrics.get(best_metric or "", worst)

        keep: list[Any] = [LatestN(keep_last)]
        if best_metric is not None:
            reverse = best_mode == "min"
            # By default BestN would also keep every checkpoint that has no score.
            unscored = {"keep_checkpoints_without_metrics": False}
            keep.append(BestN(get_metric_fn=score, reverse=reverse, n=1, **unscored))
        options = ocp.CheckpointManagerOptions(
            preservation_policy=AnyPreservationPolicy(keep),
            best_fn=score if best_metric is not None else None,
            best_mode=best_mode,
            cleanup_tmp_directories=self._on_disk,
            async_options=ocp.AsyncOptions(post_finalization_callback=self._sum_files),
        )
        registry = ocp.handlers.DefaultCheckpointHandlerRegistry()
        self._handler = manifest.SummedState(self._end_all)
        registry.add("state", ocp.args.StandardSave, self._handler)
        registry.add("state", ocp.args.StandardRestore, self._handler)
        if not self._on_disk:
            bucket.prepare(self.directory)
        elif jax.process_index() == 0:
            self.directory.mkdir(parents=True, exist_ok=True)
        with bucket.errors_named(self.directory):
            check_shared(self.directory)
            self._manager = _Manager(self.directory, options=options, handler_registry=registry)
            self._claim = Claim(self.directory)

    def check_space(self, state: Any) -> None:
        """Checks, before training, that the disk can hold all checkpoints that will be kept.

        Raises:
          OSError: the disk cannot hold them and the one being written.
        """
        if not self._on_disk:
            return
        size, count = nbytes(state), self._kept + 1
        used = sum(
            path.stat().st_size
            for step in self.steps()
            for path in Path(self.directory / str(step)).rglob("*")
            if path.is_file()
        )
        space = shutil.disk_usage(self.directory).free + used
        if count * size > space:
            raise OSError(
                f"{self.directory}: {count} checkpoints of {size:,} bytes do not fit into the"
                f" {space:,} that are free; lower --keep_last, or give another --out"
            )

    def save(self, step: int, state: Any, meta: Mapping[str, Any]) -> None:
        """Copies the state to the host, and writes it while training goes on.

        Waits for the save before this one. On return, the state may be donated to the next step.

        Args:
          state: a pytree of arrays, sharded or not.
          meta: JSON. Its `score` ranks the checkpoint for `best`.

        Raises:
          ValueError: there is a checkpoint of this step already.
          OSError: this save could not begin, or the one before it failed. The message names the
            directory and the last good checkpoint.
        """
        self.wait()
        with bucket.errors_named(self.directory):
            self._claim.check()
        if step in self._manager.all_steps():
            raise ValueError(f"{self.directory}: there is a checkpoint of step {step} already")
        if self._on_disk:
            size, free = nbytes(state), shutil.disk_usage(self.directory).free
            if size > free:
                raise self._failed(step, f"it needs {size:,} bytes, and {free:,} are free")
        scored = self.best_metric is not None and meta.get("score") is not None
        items = ocp.args.Composite(
            state=ocp.args.StandardSave(state), meta=ocp.args.JsonSave(dict(meta))
        )
        metrics = {self.best_metric: meta["score"]} if scored else None
        self._writing = step
        try:
            accepted = self._manager.save(step, args=items, metrics=metrics)
        except Exception as error:
            raise self._failed(step, str(error)) from error
        if not accepted:  # orbax does not save a step before its newest
            raise self._failed(step, "a later checkpoint is there; see --resume_step")

    def wait(self) -> None:
        """Returns when no checkpoint is being written.

        Raises:
          OSError: the checkpoint could not be written; see `save`.
        """
        try:
            self._manager.wait_until_finished()
        except Exception as error:
            raise self._failed(None, str(error)) from error
        if not self._on_disk:
            bucket.forget_listings(self.directory)
        if self._writing is not None:
            self._on_written(self._writing)
            self._writing = None

    def steps(self) -> list[int]:
        """The steps of all good checkpoints, after waiting for one that is being written."""
        self.wait()
        return sorted(self._manager.all_steps())

    def latest(self) -> int | None:
        """The step of the last good checkpoint, after waiting for one that is being written."""
        self.wait()
        return self._manager.latest_step()

    def latest_whole(self, chosen: Callable[[int], None] = lambda step: None) -> int | None:
        """The step of the last checkpoint without damage. All hosts call this.

        Damaged checkpoints after it are named, and set aside, and so are earlier ones whose score
        is damaged. A checkpoint without checksums counts as whole, with a warning.

        Args:
          chosen: gets the step before a checkpoint is moved: after a kill in between, those that
            were moved have not vanished.
        """
        whole, damaged = None, {}
        for step in reversed(self.steps()):
            if (why := self.damage(step, manifest.SCORE if whole is not None else "")) is not None:
                damaged[step] = why
            elif whole is None:
                whole = step
        if whole is not None:
            chosen(whole)
        for step, why in damaged.items():
            self._set_aside_damaged(step, why)
        return whole

    def best(self) -> int | None:
        """The step of the checkpoint with the best score; None if no checkpoint has a score.

        Damaged checkpoints are named and set aside.
        """
        while any(self.score(step) is not None for step in self.steps()):
            step = self._manager.best_step()
            if step is None or (why := self.damage(step)) is None:
                return step
            self._set_aside_damaged(step, why)
        return None

    def damage(self, step: int, part: str = "") -> str | None:
        """What is wrong with a checkpoint's files, or with those in `part`. All hosts call this."""
        where = self.directory / str(step)
        with bucket.errors_named(self.directory):
            if hosts.agree(manifest.exists(where)):
                return manifest.damage(where, part)
        if not part:
            self._say(f"warning: {where} has no checksums, so that damage would not be seen")
        return None

    def set_aside(self, step: int) -> epath.Path:
        """Moves a checkpoint out of sight, to `set_aside` in the directory. All hosts call this.

        Returns:
          Its new place.
        """
        self.wait()
        aside = self.directory / "set_aside"
        names = (f"{step}" if count == 1 else f"{step}.{count}" for count in itertools.count(1))
        target = next(aside / name for name in names if not (aside / name).exists())
        hosts.wait_for_all("set aside: named")
        if jax.process_index() == 0:
            aside.mkdir(exist_ok=True)
            manifest.move(self.directory / str(step), target)
        hosts.wait_for_all("set aside: moved")
        self._manager.reload()
        return target

    def _set_aside_damaged(self, step: int, why: str) -> None:
        where = self.directory / str(step)
        self._say(f"{where} is damaged ({why}): moved to {self.set_aside(step)}")

    def _sum_files(self) -> None:
        """Host 0 calls this in the background, when a checkpoint is complete but for its name."""
        try:
            manifest.write(self._handler.step_directory)
        except Exception as error:
            self._end_all(error)
            raise

    def _end_all(self, error: Exception) -> None:
        """Ends all hosts, if there are several, because one could not write its share."""
        if jax.process_count() > 1:
            message = (
                f"{self.directory}: the checkpoint of step {self._writing} could not be written by"
                f" host {jax.process_index()}: {error}; --resume continues from the one before"
            )
            print(f"error: {message}", file=sys.stderr)
            hosts.end(1, message)

    def score(self, step: int) -> float | None:
        """The `best_metric` of a checkpoint, from its metadata; None if it was saved without."""
        return (self._manager.metrics(step) or {}).get(self.best_metric)

    def restore(self, step: int, abstract_state: Any) -> tuple[Any, dict[str, Any]]:
        """Reads a checkpoint.

        Args:
          step: from `latest` or `best`.
          abstract_state: the state's tree of arrays, or of ShapeDtypeStructs with shardings. The
            state is restored onto these shardings, whatever mesh it was saved from.

        Returns:
          (state, meta)

        Raises:
          ValueError: the checkpoint has another tree or other shapes, or another host has ended.
          OSError: the bucket can't be used.
        """
        self.wait()
        items = ocp.args.Composite(
            state=ocp.args.StandardRestore(abstract(abstract_state)), meta=ocp.args.JsonRestore()
        )
        try:
            with bucket.errors_named(self.directory):
                restored: Any = self._manager.restore(step, args=items)
        except (ValueError, KeyError, OSError) as error:
            if hosts.may_be_remote(error) or (isinstance(error, OSError) and not self._on_disk):
                raise
            where = self.directory / str(step)
            raise ValueError(f"{where} is not a checkpoint of this state: {error}") from error
        return restored.state, restored.meta

    def restore_params(self, step: int, abstract_params: Any) -> Any:
        """Reads the `params` of a checkpoint's TrainState, without its optimizer.

        Args:
          step: from `latest` or `best`.
          abstract_params: as in `restore`, of the parameters alone.

        Raises:
          ValueError: the checkpoint has other parameters.
          OSError: the bucket can't be used.
        """
        self.wait()
        target = {"params": abstract(abstract_params)}
        args = ocp.args.PyTreeRestore(
            target,
            restore_args=ocp.checkpoint_utils.construct_restore_args(target),
            partial_restore=True,
        )
        where = self.directory / str(step)
        # The manager restores `state` only by the handler that saves it, which reads all of it.
        with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as reader:
            try:
                with bucket.errors_named(self.directory):
                    restored: Any = reader.restore(where / "state", args=args)
            except (ValueError, KeyError) as error:
                raise ValueError(f"{where} has no such parameters: {error}") from error
        # What was not saved comes back as it was given.
        if not all(isinstance(leaf, jax.Array) for leaf in jax.tree.leaves(restored)):
            raise ValueError(f"{where} has no such parameters: some were not saved")
        return restored["params"]

    def close(self) -> None:
        """Waits, and ends the background threads. Raises as `wait` does."""
        self.wait()
        self._manager.close()

    def _failed(self, step: int | None, why: str) -> OSError:
        self._writing = None
        lost = "the last checkpoint" if step is None else f"the checkpoint of step {step}"
        # The manager has forgotten the checkpoints that it would have deleted after this save.
        try:
            self._manager.reload()
            last = self._manager.latest_step()
            good = "there is none before it" if last is None else f"the last good one is {last}"
        except Exception:  # of a bucket that cannot be read now either
            good = "those before it cannot be listed"
        return OSError(f"{self.directory}: {lost} could not be written, {good}: {why}")


class _Manager(ocp.CheckpointManager):
    """Reads all scores when it is made. One that cannot be read counts as none."""

    def metrics(self, step: int) -> Any:
        try:
            metrics = super().metrics(step)
        except ValueError:  # damaged, which `latest_whole` says
            return None
        return metrics if isinstance(metrics, dict) else None


def abstract(state: Any) -> Any:
    """A tree of arrays as ShapeDtypeStructs with shardings."""
    return jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), state
    )


def nbytes(state: Any) -> int:
    """Bytes of a tree's arrays, each element counted once however many devices hold a copy."""
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(state))
