"""Environment variables that contradict each other or make no sense."""

from faults.damage import Fault, nothing

RUN = "{root}/model builtin --sparsity .5 --eval builtin"
MEETING = {"WORLD_SIZE": "2", "RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"}  # as torchrun sets them
AS_TORCHRUN = "as torchrun sets it; start with torchrun, or unset WORLD_SIZE"
HUB = "must be the URL of a hub, such as https://huggingface.co"


def number(name, given, limits):
    return Fault(nothing, f"{name} {given}: must be a whole number, {limits}, {AS_TORCHRUN}", RUN,
                 env=MEETING | {name: given})


def alone(given, missing):
    return Fault(nothing, f"WORLD_SIZE {given['WORLD_SIZE']}: {missing} must be set too; start with torchrun, or unset "
                          "WORLD_SIZE", RUN, env=given)


FAULTS = {
    "a number of processes in words": number("WORLD_SIZE", "two", "at least 1"),
    "no processes at all": number("WORLD_SIZE", "0", "at least 1"),
    "less than no processes": number("WORLD_SIZE", "-2", "at least 1"),
    "half a process": number("WORLD_SIZE", "1.5", "at least 1"),
    "too many processes to count": number("WORLD_SIZE", "9" * 5000, "at least 1"),
    "digits of another script": number("WORLD_SIZE", "²", "at least 1"),
    "a rank in words": number("RANK", "first", "from 0 to 1"),
    "a rank beyond the last": number("RANK", "2", "from 0 to 1"),
    "a negative rank": number("RANK", "-1", "from 0 to 1"),
    "a variable of the scheduler that it did not replace": number("RANK", "$SLURM_PROCID", "from 0 to 1"),
    "a local rank in words": number("LOCAL_RANK", "x", "at least 0"),
    "a negative local rank": number("LOCAL_RANK", "-1", "at least 0"),
    "a port in words": number("MASTER_PORT", "http", "from 0 to 65535"),
    "a port beyond the last": number("MASTER_PORT", "65536", "from 0 to 65535"),
    "a number of processes and nothing else": alone({"WORLD_SIZE": "2"}, "RANK, MASTER_ADDR, MASTER_PORT"),
    "a number of processes and a rank": alone({"WORLD_SIZE": "4", "RANK": "0"}, "MASTER_ADDR, MASTER_PORT"),
    "processes without a port": alone({**MEETING, "MASTER_PORT": ""}, "MASTER_PORT"),
    "processes without ranks": alone({**MEETING, "RANK": "", "SLURM_PROCID": "1"}, "RANK"),
    "a hub that is no URL": Fault(nothing, f"HF_ENDPOINT nonsense: {HUB}", RUN, env={"HF_ENDPOINT": "nonsense"}),
    "a hub without a scheme": Fault(
        nothing, f"HF_ENDPOINT localhost:80: {HUB}", RUN, env={"HF_ENDPOINT": "localhost:80"}),
    "a hub in a file": Fault(nothing, f"HF_ENDPOINT file:///hub: {HUB}", RUN, env={"HF_ENDPOINT": "file:///hub"}),
    "a hub without a host": Fault(nothing, f"HF_ENDPOINT https://: {HUB}", RUN, env={"HF_ENDPOINT": "https://"}),
    "a hub with a port in words": Fault(
        nothing, f"HF_ENDPOINT http://127.0.0.1:x: {HUB}", RUN, env={"HF_ENDPOINT": "http://127.0.0.1:x"}),
    "a hub with half a bracket": Fault(
        nothing, f"HF_ENDPOINT http://[::1: {HUB}", RUN, env={"HF_ENDPOINT": "http://[::1"}),
    "a hub with a space": Fault(
        nothing, f"HF_ENDPOINT http://127.0.0.1 /hub: {HUB}", RUN, env={"HF_ENDPOINT": "http://127.0.0.1 /hub"}),
    "a hub with a line break": Fault(
        nothing, f"HF_ENDPOINT http://127.0.0.1\\n: {HUB}", RUN, env={"HF_ENDPOINT": "http://127.0.0.1\n"}),
}
