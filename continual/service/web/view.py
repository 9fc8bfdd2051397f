"""What the service shows of the present, as frozen records. Who gives them is in `seen.py`, how it looks in
`pages/`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from continual.service.health import Shortfall
from continual.sources.contract import SourceReport
from continual.texts import Json, jsonable


@dataclass(frozen=True, slots=True)
class ShownScale:
    """Where the scale in force was tuned: the number of the record, and how many models were folded then."""

    record: int
    folds: int


@dataclass(frozen=True, slots=True)
class UnderWay:
    """What the daemon does now: the name of the candidate (or of a round), the stage, and how many of the stage's
    `total` steps are `done`."""

    model: str
    stage: str
    done: int
    total: int


@dataclass(frozen=True, slots=True)
class ShownFold:
    """A fold: the number and time of its record, the model's name and form, the norm of its task vector, its cosine
    with the merge before it, and its weight. None: the rule does not measure it. `left_out`: the first of its tensors
    that this state lacks and that stay out, and how many more; empty where there are none. `warned`: the reasons of
    gates that only warned. `cut`, `cut_now`: of a state of adapters, the share of ‖τ‖² that was cut off when it came,
    and by now. `model_id`: what stands for the model's key in addresses of pages."""

    seq: int
    time: str
    model: str | None
    form: str | None
    tau_norm: float | None
    cosine: float | None
    weight: float | None
    left_out: str = ""
    warned: str = ""
    cut: float | None = None
    cut_now: float | None = None
    model_id: str = ""


@dataclass(frozen=True, slots=True)
class ShownRefusal:
    """A refusal: the number and time of its record, the model's name, the short reason and the sentence; `model_id`: as
    in `ShownFold`; `now`: what it is by now, in words, where that was asked."""

    seq: int
    time: str
    model: str | None
    reason: str | None
    message: str | None
    model_id: str = ""
    now: str = ""


@dataclass(frozen=True, slots=True)
class ShownPublication:
    """A release, or a hook that was called: the number and time of its record, and what it says."""

    seq: int
    time: str
    message: str | None


@dataclass(frozen=True, slots=True)
class ShownForm:
    """What the state keeps: `whole tensors`, or `adapters`. Of adapters: `width`, how many singular triplets a layer
    can have; `used`, how many the fullest has, and `layers`, how many have any (None: cannot be read); `cut`, the share
    of the sum of all ‖τ‖² that was cut off by now."""

    kind: str
    width: int | None = None
    used: int | None = None
    layers: int | None = None
    cut: float | None = None


@dataclass(frozen=True, slots=True)
class ShownShare:
    """What a model has in what is out: its weight, its share of the lengths of all task vectors, its cosine with the
    merge, and how much of that changes without it."""

    model: str
    weight: float
    norm: float
    cosine: float
    change: float


@dataclass(frozen=True, slots=True)
class ShownShares:
    """What each of `count` models has in what lies at a `place` (a link, or a repo), the largest change first: of a
    view, or (None) of the merge. They hold for record `seq`, which is what went out, and not for what was folded
    since."""

    view: str | None
    seq: int
    place: str
    models: tuple[ShownShare, ...]
    count: int


@dataclass(frozen=True, slots=True)
class ShownView:
    """A view of the settings: the rule that reads it and its scale, how many models it reads and the first of them, and
    the `problem` where it cannot be read. `form`: as what it goes out. `current`: its link, with the record and the
    time of the export that it points at; `repo`: where it is released to, with the newest record that is out. None:
    there is none."""

    name: str
    rule: str
    scale: str
    count: int
    models: str
    problem: str
    form: str
    current: str | None
    current_seq: int | None
    current_time: str | None
    repo: str | None
    released_seq: int | None


@dataclass(frozen=True, slots=True)
class ShownCanary:
    """A canary, of a view or (None) of the merge: record `seq`, which is to replace record `back` (None: nothing is
    out). `phase`: `goes out`, `watched`, `promoted` (on its way) or `failed` (being taken back); `since`: when it was
    out. Of `measurements` in all, how many of the newest `kept` were alarms (`failed`) or said nothing
    (`inconclusive`); `said`: the newest, or why it was decided. `places`: where it lies."""

    view: str | None
    seq: int
    back: int | None
    phase: str
    since: str | None
    places: tuple[str, ...]
    measurements: int
    kept: int
    failed: int
    inconclusive: int
    said: str


@dataclass(frozen=True, slots=True)
class ShownRound:
    """A round: the number and time of its record, the loss at its end and before it, the duality gap at its end, and
    how many steps it took."""

    seq: int
    time: str
    loss: float
    before: float
    gap: float
    steps: int


@dataclass(frozen=True, slots=True)
class ShownWaiting:
    """A candidate in the pool: its name, when it was first seen, how many rounds judged it, and what the last one
    measured and said. None: no round has judged it."""

    model: str | None
    since: str
    rounds: int
    score: float | None
    z: float | None
    said: str
    model_id: str = ""


@dataclass(frozen=True, slots=True)
class ShownQueued:
    """A candidate in the queue: its name and origin, how often it failed so far, what was said the last time, and when
    it is tried again (RFC 3339, UTC). None: it has not been looked at."""

    model: str
    origin: str
    failures: int
    error: str | None
    next_try: str | None


@dataclass(frozen=True, slots=True)
class ShownWork:
    """What machines of a cluster did for this process: orders, the bytes that these read, the seconds that they
    took."""

    orders: int
    read_bytes: int
    seconds: float


@dataclass(frozen=True, slots=True)
class ShownNode:
    """A machine of a cluster: its address, whether it is alive, and the cores, bytes of memory and GPUs that it has for
    orders; its `work`, when it last gave an order back, and with which tensor that order began (None: it did none);
    on how many orders it works now, and with which tensor the one `on` it begins that it has for the longest."""

    address: str
    alive: bool
    cores: float
    memory_bytes: int
    gpus: float
    work: ShownWork
    heard: str | None
    last: str | None
    working: int
    on: str | None


@dataclass(frozen=True, slots=True)
class ShownAvoided:
    """A machine of a cluster that is given no orders for a while: why, since when and until when."""

    address: str
    why: str
    since: str
    until: str


@dataclass(frozen=True, slots=True)
class ShownOrder:
    """An order that is out: the tensor with which it begins, how many it has, since when, and how often it was lost
    with a worker before; which machine works on it, since when (None: it waits for a core)."""

    tensor: str
    tensors: int
    since: str
    lost: int
    machine: str | None
    began: str | None


@dataclass(frozen=True, slots=True)
class ShownCluster:
    """The cluster that does the work. `address`: of the setting; `answered`: when it last said which machines it has
    (None: never); `connected`: whether its driver lives; `problem`: where it does not, or has no answer. Of the
    machines that are `alive`, all `cores`, `memory_bytes` and `gpus`; `nodes`: some of the machines; `others`: what
    further ones did, which are not told of; `work`: what all did; `lost`: orders that were lost with a worker;
    `failed`: those that a machine could not do, and another was asked; `avoided`: machines that get none for a while.
    Of the work under way `done` of `total` orders came back and `out` are under way, the oldest of them in `orders`."""

    address: str
    answered: str | None
    connected: bool
    problem: str
    alive: int
    cores: float
    memory_bytes: int
    gpus: float
    nodes: tuple[ShownNode, ...]
    others: ShownWork
    work: ShownWork
    lost: int
    failed: int
    avoided: tuple[ShownAvoided, ...]
    done: int
    total: int
    out: int
    orders: tuple[ShownOrder, ...]


@dataclass(frozen=True, slots=True)
class Status:
    """The state and, where one runs, its daemon. Sizes in bytes, times as RFC 3339 (UTC) or in seconds.

    `select` says who chooses what is folded. `pool` has the newest of the `pool_size` candidates that wait for a round,
    `queue` some of the `queued` candidates that are to be looked at, those that failed first. `degraded` says what is
    wrong though the daemon runs. `watch` are the folders of the settings;
    `sources` has what each kind of source says of itself, None where none of the kind runs; `notes` is what they see
    that is no model. Lists of records begin with the newest. `paused`: since when nothing is folded (empty: not known),
    None where folding goes on. `back`: the records that can be gone back to, as the first and the last of each row of
    them. `shares` are of what is out, at the record that each names. `cluster`: None where all is done on this machine.
    """

    version: str
    health: str
    why: str
    degraded: tuple[Shortfall, ...]
    pid: int | None
    url: str | None
    uptime_seconds: float | None
    state: str
    state_id: str
    base: str
    rule: str
    options: Mapping[str, object]
    scale: str
    tuned: ShownScale | None
    watch: tuple[str, ...]
    sources: Mapping[str, SourceReport | None]
    notes: tuple[str, ...]
    paused: str | None
    head: int
    back: tuple[tuple[int, int], ...]
    folds: int
    generations: int
    state_bytes: int
    disk_free_bytes: int | None
    totals: Mapping[str, float]
    gauges: Mapping[str, float]
    queue: tuple[ShownQueued, ...]
    queued: int
    select: str
    pool_size: int
    pool: tuple[ShownWaiting, ...]
    last_round: ShownRound | None
    current: UnderWay | None
    last_folds: tuple[ShownFold, ...]
    refusals: tuple[ShownRefusal, ...]
    published: tuple[ShownPublication, ...]
    peak_memory_bytes: float | None
    form: ShownForm = ShownForm("whole tensors")
    views: tuple[ShownView, ...] = ()
    shares: tuple[ShownShares, ...] = ()
    canaries: tuple[ShownCanary, ...] = ()
    cluster: ShownCluster | None = None

    def body(self) -> dict[str, Json]:
        """What `/api/status` and `continual status --json` give: each kind of source has a key of its own name."""
        fields = jsonable(self)
        assert isinstance(fields, dict)
        found: dict[str, Json] = {}
        for key, value in fields.items():
            found.update(value if key == "sources" and isinstance(value, dict) else {key: value})
        return found
