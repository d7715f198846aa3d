"""Reads the environment of a sender: W&B's address, the user's key, and the SLURM job."""

import os
from typing import NoReturn

from caduceus.errors import UserError


def base_url() -> str:
    import wandb

    return wandb.setup().settings.base_url.rstrip("/")


def key() -> str | None:
    """The user's API key, from WANDB_API_KEY or `wandb login`; None without. Raises `UserError` for an
    impossible one.
    """
    from wandb.errors import AuthenticationError
    from wandb.sdk.lib import wbauth

    try:
        found = wbauth.authenticate_session(host=base_url(), source="caduceus", prompt=False, update_session=False)
    except AuthenticationError as error:
        raise UserError(f"the API key is not valid: {' '.join(str(error).split())}") from None
    return getattr(found, "api_key", None)


def no_key() -> NoReturn:
    raise UserError("not logged in to W&B; run `wandb login` or set WANDB_API_KEY")


def slurm() -> dict[str, str]:
    names = ("JOB_ID", "ARRAY_JOB_ID", "ARRAY_TASK_ID", "RESTART_COUNT", "JOB_NODELIST", "NNODES", "JOB_PARTITION")
    return {name.lower(): os.environ[f"SLURM_{name}"] for name in names if f"SLURM_{name}" in os.environ}
