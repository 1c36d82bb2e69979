"""Slurm's commands as scripts, which say what they are told to and note what they are asked."""

import os
from pathlib import Path

# For bash: other shells forget which signals they were told not to hear.
SBATCH = """\
if [ -s {folder}/refusal ]; then cat {folder}/refusal >&2; exit 1; fi
cp "$1" "$(mktemp {folder}/script-XXXXXX)"
if [ -e {folder}/interrupt ]; then kill -INT $$ $PPID; fi
echo "Submitted batch job 12"
"""
SCONTROL = """\
echo "scontrol $*" >> {folder}/calls
cat {folder}/job
cat {folder}/complaint >&2
test ! -s {folder}/complaint
"""
SINFO = "printf 'main\\nhigh\\nmain\\n'"
JOB = """\
JobId=12 JobName={name}
   UserId=me(1000) GroupId=me(1000) MCS_label=N/A
   JobState={state} Reason=None Dependency=(null)
   ReqNodeList=(null) ExcNodeList=(null)
   NodeList=node[1-2]
   BatchHost=node1 PreemptTime={preempted}
"""


class SlurmStandIn:
    """Job 12, of whatever is submitted.

    Args:
        folder: Of the commands and what they write.
        monkeypatch: Puts them first on the path.
    """

    def __init__(self, folder: Path, monkeypatch):
        self.folder = folder
        (folder / "bin").mkdir(parents=True)
        commands = {
            "sbatch": SBATCH,
            "scontrol": SCONTROL,
            "sinfo": SINFO,
            "srun": "exit 1",
        }
        for name, text in commands.items():
            path = folder / "bin" / name
            path.write_text("#!/bin/bash\n" + text.format(folder=folder) + "\n")
            path.chmod(0o755)
        monkeypatch.setenv("PATH", f"{folder / 'bin'}{os.pathsep}{os.environ['PATH']}")
        (folder / "calls").touch()
        self.job("PENDING", "small")

    def job(self, state: str, name: str, preempted: str = "None") -> None:
        """Let job 12 be in a state, under a name, with a time since which its place is wanted."""
        self._say(JOB.format(state=state, name=name, preempted=preempted), "")

    def forget(self) -> None:
        """Let there be no such job any more."""
        self._say("", "slurm_load_jobs error: Invalid job id specified\n")

    def never_start(self) -> None:
        """Let it be a task of an array that was cancelled before its turn came."""
        self._say("", "Job 12 not found\n")

    def fall_silent(self) -> None:
        """Let the controller not answer."""
        self._say("", "Unable to contact slurm controller\n")

    def refuse(self, message: str) -> None:
        """Let sbatch refuse what is submitted from now on; nothing: accept it."""
        (self.folder / "refusal").write_text(message)

    def interrupt(self) -> None:
        """Let Ctrl-C come, as from a terminal, before sbatch says what it has submitted."""
        (self.folder / "interrupt").touch()

    @property
    def scripts(self) -> list[str]:
        """What has been submitted."""
        return [path.read_text() for path in self.folder.glob("script-*")]

    @property
    def calls(self) -> str:
        """What scontrol was asked, a line each."""
        return (self.folder / "calls").read_text()

    def _say(self, answer: str, complaint: str) -> None:
        (self.folder / "job").write_text(answer)
        (self.folder / "complaint").write_text(complaint)
