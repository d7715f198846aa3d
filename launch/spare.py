"""python -m launch.spare RUN STATUS: a batch script with spare nodes runs this when its srun has ended with a STATUS
other than 0.

Where a node was lost or failed its checks, and enough others are left, it records that end and prints options for srun
that name the nodes to use: the run goes on at once from its newest checkpoint, on nodes that the job already has. In
all other cases the exit status is 1, and the job ends like one without spare nodes (launch/requeue.py).
"""

import sys

from caduceus.errors import UserError, run_command
from caduceus.patience import exists
from caduceus.run.directory import RunDirectory
from launch import history, scheduler
from launch.history import Attempt, Reason, Submission, newest_step
from launch.logs import last_error
from launch.requeue import is_current, submission_of, this_job


def main() -> int:
    """Decide whether the job goes on on its own nodes. Returns the exit status."""
    run, job, restart = RunDirectory.open(sys.argv[1]), this_job(), history.this_restart()
    submission = submission_of(run, job)
    this = next((row for row in history.attempts(run) if (row.job, row.restart) == (job, restart)), None)
    if this is None or exists(run.stop_path) or newest_step(run) >= run.config().train.steps:
        return 1
    try:
        left = usable_nodes(run, submission, this)
    except UserError as error:
        print(f"note: {error}; the spare nodes are not used", file=sys.stderr, flush=True)
        return 1
    if left is None:
        return 1
    bad = history.bad_nodes(run, submission, job, restart)
    used = scheduler.node_names(this.nodes)
    lost = sorted({*used} - {*left, *bad})
    if not lost and not this.bad_nodes:
        return 1
    what = f"{', '.join(lost or this.bad_nodes)} {'lost' if lost else 'failed its checks'}"
    if len(left) < submission.request["nodes"]:
        print(f"{what}; no spare node is left", file=sys.stderr, flush=True)
        return 1
    reason, error = Reason.NODE_LOST, f"{', '.join(lost)}: SLURM has lost it"
    if not lost:
        reason, error = Reason.BAD_NODE, last_error(run, submission.logs, job, restart)
    history.record_attempt(
        run, "end", job, restart, reason=reason, step=newest_step(run), error=error, status=int(sys.argv[2])
    )
    chosen = sorted(left, key=lambda node: node not in used)[: submission.request["nodes"]]  # these have warm caches
    print(f"{what}; the run goes on on {', '.join(sorted(chosen))} of the same job", file=sys.stderr, flush=True)
    # After the loss of a node, SLURM 22.05 counts the cores of the step as used on the other nodes, and refuses
    # --exclude.
    print(f"--overlap --nodelist={','.join(chosen)}")
    return 0


def usable_nodes(run: RunDirectory, submission: Submission, this: Attempt) -> list[str] | None:
    """The nodes that the job still has and that passed their checks; None where SLURM ended the job.

    Raises `SilentError` where SLURM does not answer.
    """
    slurm_job = scheduler.own_job(this.job)
    if slurm_job.state != "RUNNING" or slurm_job.preempted or not is_current(slurm_job):
        return None
    bad = history.bad_nodes(run, submission, this.job, this.restart)
    return [node for node in scheduler.nodes_of(this.job) if node not in bad]


if __name__ == "__main__":
    run_command(main)
