"""How a run saves: checkpoints that are whole or not there, the adapter, and a disk that is full.

Where a checkpoint cannot be written, an error line says so, the training state stays in memory and
the last checkpoint on the disk, and the run goes on; the next checkpoint is tried as usual. With
`--on-full-disk stop` it ends instead. The adapter of a finished run whose last step no checkpoint
has is tried again until there is room.

Of several ranks the first one writes, while the others wait for it; each one's random generators
are in the checkpoint.
"""

import json
import time
from pathlib import Path
from typing import Any

from tqdm.auto import tqdm

from qlora.adapters.files import save_adapter
from qlora.errors import UserError, some
from qlora.files import replace_text
from qlora.training import ranks
from qlora.training.checkpoints import (
    STREAM,
    SafeStates,
    complete_checkpoints,
    last_checkpoint,
    new_checkpoint,
    remove_old,
)
from qlora.training.memory import out_of_memory_in
from qlora.training.outputs import disk_error, write_stops

RETRY_SECONDS = 30.0


def best_of(state: Any) -> tuple[float | None, int | None, str | None]:
    """Metric, step and folder of the best checkpoint, as Trainer's state has them."""
    return state.best_metric, state.best_global_step, state.best_model_checkpoint


class Saving(SafeStates):
    """Trainer's methods that save. `goes_on`: without a checkpoint that could not be written."""

    args: Any
    model: Any
    state: Any
    control: Any
    steps: Any
    rows_from: int
    train_dataset: Any
    processing_class: Any
    goes_on: bool
    save_model: Any
    saves_to: str | None = None  # the folder that Trainer writes the present checkpoint into
    saved_best: tuple[Any, ...] = (None, None, None)  # of the last checkpoint that was written
    unsaved_best: int | None = None  # a later step whose checkpoint could not be written

    def _save_checkpoint(self, model: Any, trial: Any = None) -> None:
        """Trainer's, but not of an adapter whose last loss was not finite; whole or not at all."""
        if not self.steps.is_sound:
            return
        self.gather_states()
        if ranks.is_first():
            self._try_checkpoint(model, trial)
        state, found = self.state, (best_of(self.state), self.unsaved_best)
        best, self.unsaved_best = ranks.of_first(found)
        state.best_metric, state.best_global_step, state.best_model_checkpoint = best

    def _try_checkpoint(self, model: Any, trial: Any) -> None:
        state, output = self.state, Path(str(self.args.output_dir))
        try:
            self._write_checkpoint(model, trial)
        except Exception as error:
            reason = disk_error(error)
            if not (reason and self.goes_on):
                raise
            if state.best_global_step == state.global_step:  # the best is one that can be loaded
                self.unsaved_best = state.global_step
                state.best_metric, state.best_global_step, state.best_model_checkpoint = (
                    self.saved_best
                )
            tqdm.write(
                f"error: checkpoint-{state.global_step} cannot be written: {reason}. Make room: "
                f"training goes on until the next checkpoint. {last_checkpoint(output)}"
            )
        else:
            self.saved_best = best_of(state)

    def _write_checkpoint(self, model: Any, trial: Any) -> None:
        state, output = self.state, Path(str(self.args.output_dir))
        step, best = state.global_step, state.best_global_step
        state.best_model_checkpoint = self.best_folder(being_written=step)
        with (
            out_of_memory_in(self, f"saving checkpoint-{step}"),
            new_checkpoint(output, step) as at,
        ):
            self.saves_to, strategy = str(at), self.args.save_strategy
            # so Trainer waits for no other ranks, and names no best that is still beside its place
            self.args.save_strategy = "no"
            try:
                super()._save_checkpoint(model, trial)  # type: ignore[misc]
            finally:
                self.saves_to, self.args.save_strategy = None, strategy
            if hasattr(self.train_dataset, "place_of"):  # a StreamedRows
                steps = step - self.rows_from
                batch = self.args.train_batch_size * self.args.gradient_accumulation_steps
                place = json.dumps(self.train_dataset.place_of(steps * batch * ranks.count()))
                replace_text(at / f"checkpoint-{step}" / STREAM, place)
        if limit := self.args.save_total_limit:
            remove_old(output, limit, {best} if best else set(), self.steps.sound_step)

    def best_folder(self, being_written: int | None = None) -> str | None:
        """The best checkpoint's folder in this run's output; None if it is not there."""
        best = self.state.best_global_step
        folder = Path(str(self.args.output_dir), f"checkpoint-{best}")
        is_there = best and (best == being_written or folder.is_dir())
        return str(folder) if is_there else None

    def _determine_best_metric(self, metrics: Any, trial: Any) -> bool:
        """Trainer's; the best is saved also between two checkpoints, if it is loaded at the end. No
        best is an adapter that is not saved, as its last loss was not finite."""
        if not self.steps.is_sound:
            return False
        is_best: bool = super()._determine_best_metric(metrics, trial)  # type: ignore[misc]
        self.control.should_save |= is_best and self.args.load_best_model_at_end
        return is_best

    def store_flos(self: Any) -> None:
        """Count operations of this rank, where Trainer waits for all ranks."""
        self.state.total_flos += self.current_flos
        self.current_flos = 0

    def _get_output_dir(self, trial: Any) -> str:
        """Where Trainer writes a checkpoint, and removes others."""
        return self.saves_to or str(self.args.output_dir)

    def _finalize_training(self, *rest: Any) -> Any:
        """Trainer's, which with a limit of one removes the last checkpoint beside the best."""
        limit, self.args.save_total_limit = self.args.save_total_limit, None
        try:
            return super()._finalize_training(*rest)  # type: ignore[misc]
        finally:
            self.args.save_total_limit = limit

    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
        folder = str(output_dir or self.args.output_dir)
        parameters = self.model.named_parameters()
        broken = [n for n, p in parameters if p.requires_grad and not p.isfinite().all()]
        if broken:
            raise UserError(f"{some(broken)}: {self.steps.fault()}")
        save_adapter(self.model, folder)
        if self.processing_class is not None:
            self.processing_class.save_pretrained(folder)
            write_stops(Path(folder), self.model, self.processing_class)

    def save_result(self, output: Path) -> None:
        """Save the adapter of the run; on a full disk, wait for room if no checkpoint has its last
        step."""
        is_told = False
        while True:
            try:
                self.save_model(str(output))
                return
            except Exception as error:
                reason, step = disk_error(error), self.state.global_step
                if not (reason and self.goes_on) or step in complete_checkpoints(output):
                    raise
            if not is_told:
                has = f"The adapter of step {self.adapter_step}"  # type: ignore[attr-defined]
                tqdm.write(
                    f"error: {output} cannot be written: {reason}. {has} is in memory only: make "
                    f"room, it is tried again every {RETRY_SECONDS:.0f} s"
                )
            is_told = True
            time.sleep(RETRY_SECONDS)
