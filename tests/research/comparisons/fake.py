"""A system under test without any work in it: sleeps, counts, writes down when it was its turn, fails on demand.

python fake.py NAME SECONDS DIARY MODE PARAMETERS; MODE: well, crash (in the second timed lap), hang, chatter.
"""

import json
import sys
import time
from pathlib import Path

NAME, SECONDS, DIARY, MODE, PARAMETERS = (
    sys.argv[1],
    float(sys.argv[2]),
    Path(sys.argv[3]),
    sys.argv[4],
    int(sys.argv[5]),
)


def note(what: str) -> None:
    """One line for each beginning and end."""
    with DIARY.open("a", encoding="utf-8") as diary:
        diary.write(f"{NAME} {what}\n")


def say(**message: object) -> None:
    """One line of JSON."""
    print(json.dumps(message), flush=True)


workload = json.loads(sys.stdin.readline())
note("built")
say(parameters=PARAMETERS, versions={"fake": "1"})
for number, _ in enumerate(sys.stdin, -2):  # two of warm-up
    note("start" if number >= 0 else "warm")
    if MODE == "crash" and number == 1:
        print("loading shards\nRuntimeError: the wheel came off", file=sys.stderr)
        sys.exit(3)
    if MODE == "hang":
        time.sleep(60)
    if MODE == "chatter":
        print("Loading checkpoint shards: 100%", flush=True)
    time.sleep(SECONDS)
    if number >= 0:
        note("end")
    say(peak_bytes=1024 * (1 + number), tokens=workload["tokens"])
note("bye")
