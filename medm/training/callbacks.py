"""Callbacks of a run: progress lines, the loss curve, and the handling of stop signals."""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from importlib.util import find_spec
from pathlib import Path

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from medm.distributed import any_rank
from medm.stopping import RESUMABLE, STOP_SIGNALS

logger = logging.getLogger(__name__)

LOSS_LOG, LOSS_CURVE = "loss.jsonl", "loss.png"


class Interruption(TrainerCallback):
    """Stop after SIGTERM or SIGINT: finish the step, write a checkpoint, stop.

    Further signals have no effect. All ranks of a run stop at the same step, whichever rank got the
    signal. Before the first step there is nothing to save, and a signal ends the run at once.
    """

    def __init__(self) -> None:
        self.raised = False
        self._deferred: ExitStack | None = None

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Defer both signals from the first step inside to the end of the outermost context."""
        if self._deferred is not None:
            yield
            return
        with ExitStack() as self._deferred:
            try:
                yield
            finally:
                self._deferred = None

    def on_train_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        **kwargs: object,
    ) -> None:
        if self._deferred is not None:
            self._deferred.enter_context(STOP_SIGNALS.deferred())

    def on_step_end(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        **kwargs: object,
    ) -> None:
        received = STOP_SIGNALS.received
        if any_rank(received is not None, args.device):
            self.raised = True
            control.should_save, control.should_training_stop = True, True
            if state.is_world_process_zero:
                logger.warning(
                    "%s: stopping after step %d; continue with --resume (exit code %d)",
                    received.name if received else "a signal to another rank",
                    state.global_step,
                    RESUMABLE,
                )

    def on_epoch_end(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        **kwargs: object,
    ) -> None:
        if self.raised:  # the epoch is not over, the run is
            control.should_evaluate, control.should_save = False, False


class Progress(TrainerCallback):
    """One line per log step, from rank 0."""

    def __init__(self) -> None:
        self._started, self._first_step = 0.0, 0

    def on_train_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        **kwargs: object,
    ) -> None:
        self._started, self._first_step = time.monotonic(), state.global_step

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: Mapping[str, float] | None = None,
        **kwargs: object,
    ) -> None:
        if not state.is_world_process_zero or not logs or "train_runtime" in logs:
            return
        if "loss" in logs or "steps_without_samples" in logs:
            values = [f"loss {logs['loss']:.4f}" if "loss" in logs else "no loss"]
            values += [
                f"{name.removeprefix('loss/')} {value:.4f}"
                for name, value in logs.items()
                if name.startswith("loss/")
            ]
            if "steps_without_samples" in logs:
                values.append(f"({logs['steps_without_samples']} steps without samples)")
            values += [f"lr {logs['learning_rate']:.2e}"] if "learning_rate" in logs else []
            done = state.global_step - self._first_step
            seconds = (time.monotonic() - self._started) / max(done, 1)
            values += [
                f"{seconds:.2f} s/step",
                f"{_clock(seconds * (state.max_steps - state.global_step))} left",
            ]
        else:
            values = [
                f"{name} {value:.4f}" for name, value in logs.items() if name.endswith("_loss")
            ]
        if values:
            logger.info("step %d/%d  %s", state.global_step, state.max_steps, "  ".join(values))


class LossCurve(TrainerCallback):
    """Loss curve: `loss.jsonl`, one line per log step, and at the end `loss.png`.

    A resumed run rewrites both from its history. An error while writing them is a warning, and
    training continues.
    """

    def __init__(self) -> None:
        self._incomplete = False

    def on_train_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        **kwargs: object,
    ) -> None:
        if state.is_world_process_zero:
            self._rewrite(args, state)

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        **kwargs: object,
    ) -> None:
        if not state.is_world_process_zero or self._incomplete:
            return
        try:
            with (Path(args.output_dir or "") / LOSS_LOG).open("a", encoding="utf-8") as file:
                file.write(_line(state.log_history[-1]))
        except OSError as error:
            self._incomplete = True
            logger.warning(
                "%s cannot be written (%s); training continues, and the file is written again at "
                "the end",
                LOSS_LOG,
                error.strerror or error,
            )

    def on_train_end(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        **kwargs: object,
    ) -> None:
        if state.is_world_process_zero:
            if self._incomplete:
                self._rewrite(args, state)
            try:
                draw_curve(state.log_history, Path(args.output_dir or "") / LOSS_CURVE)
            except Exception as error:  # noqa: BLE001  # any error of a plotting library: the run must not fail for a figure
                logger.warning(
                    "no %s: %s: %s; the numbers are in %s",
                    LOSS_CURVE,
                    type(error).__name__,
                    error,
                    LOSS_LOG,
                )

    def _rewrite(self, args: TrainingArguments, state: TrainerState) -> None:
        path = Path(args.output_dir or "") / LOSS_LOG
        try:
            path.write_text("".join(_line(entry) for entry in state.log_history), encoding="utf-8")
            self._incomplete = False
        except OSError as error:
            self._incomplete = True
            logger.warning(
                "%s cannot be written (%s); training continues", path, error.strerror or error
            )


def draw_curve(history: Sequence[Mapping[str, float]], path: Path) -> bool:
    """Draw loss over steps as a PNG. Without matplotlib, log it and return False."""
    if find_spec("matplotlib") is None:
        logger.info(
            "no %s: matplotlib is not installed (pip install 'medm[plot]'); the numbers are in %s",
            path.name,
            LOSS_LOG,
        )
        return False
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    for key, label, style in (("loss", "training", "-"), ("eval_loss", "held out", "o-")):
        points = [(entry["step"], entry[key]) for entry in history if key in entry]
        if points:
            axes.plot(*zip(*points, strict=True), style, label=label, markersize=3)
    axes.set_xlabel("step")
    axes.set_ylabel("loss")
    axes.grid(alpha=0.3)
    if axes.lines:
        axes.legend()
    figure.savefig(path, dpi=120)
    return True


def _line(entry: Mapping[str, float]) -> str:
    return json.dumps(dict(entry)) + "\n"


def _clock(seconds: float) -> str:
    minutes, seconds = divmod(max(int(seconds), 0), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{seconds:02d}" if hours else f"{minutes}:{seconds:02d}"
