"""One of two ranks: the second stops itself in the third step, as a machine that hangs does.

python -m tests.training.stopped_rank FOLDER RANK PORT
"""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path
from typing import Any

RANK = int(sys.argv[2])
os.environ |= {
    "RANK": str(RANK), "LOCAL_RANK": str(RANK), "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2",
    "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": sys.argv[3],
}  # fmt: skip

from transformers import TrainerCallback  # noqa: E402

from medm.errors import MedmError  # noqa: E402
from tests.training.toys import trainer  # noqa: E402


class StandStill(TrainerCallback):
    """SIGSTOP: the process is there, and does nothing any more."""

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == 2 and RANK == 1:
            os.kill(os.getpid(), signal.SIGSTOP)


if __name__ == "__main__":
    run = trainer(
        Path(sys.argv[1]),
        max_steps=6,
        per_device_train_batch_size=2,
        ddp_timeout=12,
        callbacks=[StandStill()],
    )
    try:
        run.fit()
    except MedmError as error:
        print(f"MedmError: {error}", flush=True)
        os._exit(1)
