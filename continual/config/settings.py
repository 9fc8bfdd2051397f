"""Every setting: its name, type, default and meaning. Pydantic validates them; where they are given, `given` knows.

ops/docs/commands.md shows the same names, defaults and meanings; a test compares the two.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal, Self

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, model_validator

from continual.config.canary import CanarySettings
from continual.config.cluster import RaySettings
from continual.config.evaluating import EvaluationSettings
from continual.config.notify import NotifySettings
from continual.config.round_settings import RoundSettings
from continual.config.signing import SigningSettings
from continual.config.values import (
    Bytes,
    File,
    Home,
    LongSecret,
    Paths,
    Repos,
    Seconds,
    Secret,
    Texts,
    by_name,
    pairs,
    rank,
    written,
)
from continual.stores import ObjectPath, where
from continual.stores.objects import LEASE


class HubSettings(BaseModel):
    """What is looked for on the Hugging Face Hub, and what of it is taken. Times are seconds; ops/docs/hub.md says what
    each means."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    watch: bool = Field(default=False, description="poll the Hub for fine-tunes and adapters of the base")
    bases: Repos = Field(
        default=(),
        description="repos whose fine-tunes are taken; default: the base of the state, where it came from the Hub",
    )
    relations: Texts = Field(
        default=("finetune", "adapter"),
        description="how a repo may name its base: finetune, adapter, merge or quantized",
    )
    repos: Repos = Field(default=(), description="repos that are watched whatever they say of their base")
    authors: Texts = Field(default=(), description="users and organisations all of whose models are looked at")
    read: Literal["stream", "cache"] = Field(
        default="stream",
        description="read weights by ranges, nothing on disk; or through the cache of the Hub's client",
    )
    poll: Annotated[float, Field(gt=0)] = Field(default=300.0, description="how often the Hub is asked for what is new")
    sweep: Annotated[float, Field(gt=0)] = Field(default=6 * 3600.0, description="how often it is asked for everything")
    settle: Seconds = Field(default=60.0, description="how long a repo must be without a new commit before it is taken")
    since: str | None = Field(
        default=None, description="repos whose last commit is older are not looked at, as 2026-01-31; default: all are"
    )
    allow: Texts = Field(
        default=(), description="globs over repos (org/name); where there are any, only what matches is taken"
    )
    deny: Texts = Field(default=(), description="globs over repos that are never taken")
    licences: Texts = Field(
        default=(), description="globs over licences; where there are any, only what matches is taken"
    )
    deny_licences: Texts = Field(default=(), description="globs over licences that are never taken")
    tags: Texts = Field(default=(), description="tags a repo must have, all of them")
    deny_tags: Texts = Field(default=(), description="globs over tags of repos that are never taken")
    max_bytes: Bytes | None = Field(default=None, description="largest weights that are taken")
    gated: Literal["take", "refuse"] = Field(
        default="take", description="what to do with gated repos that the token may read"
    )
    private: Literal["take", "refuse"] = Field(
        default="take", description="what to do with private repos that the token may read"
    )


class ReleaseSettings(BaseModel):
    """Where on the Hub the merged model is published, and how."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    repo: str | None = Field(
        default=None, description="repo (org/name) the merged model is published to; made if it is not there"
    )
    every: bool = Field(default=False, description="publish every fold; default: the newest when the one before is out")
    branch: str = Field(default="main", description="branch that is committed to; made if it is not there")
    tag: str | None = Field(default="record-{seq}", description="tag of each release; empty: none")
    private: bool = Field(default=True, description="make the repo private, where it has to be made")
    licences: Literal["warn", "refuse"] = Field(
        default="warn", description="what to do where licences of the base and the folded models differ"
    )
    dtype: str | None = Field(default=None, description="float32, float16 or bfloat16; default: the base's")
    canary: CanarySettings | None = Field(
        default=None,
        description="put the merge out as a canary first, and watch it: a table; default: not",
    )


class ViewSettings(BaseModel):
    """A reading of the state that has a name of its own, and where it is put out. A state that keeps a merge of whole
    tensors takes `rule`, `scale` and `lines` alone."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    only: Texts = Field(
        default=(), description="models that are read, by name, path or glob; default: all. A glob may match none yet"
    )
    without: Texts = Field(default=(), description="models that are not read, by name, path or glob")
    weights: dict[str, float] = Field(
        default_factory=dict, description="models and the weight that each is read with; default: that of its fold"
    )
    rule: str | None = Field(default=None, description="rule that reads; default: that of the state")
    options: dict[str, object] = Field(default_factory=dict, description="options of that rule")
    scale: Annotated[str | None, BeforeValidator(written)] = Field(
        default=None, description="scale, as continual scale takes it"
    )
    lines: str | None = Field(default=None, description="layer scaling, as continual scale takes it")
    current: File | None = Field(
        default=None, description="a link that is kept pointing at an export of the view, as the setting current is"
    )
    as_lora: Annotated[int | Literal["own"] | None, BeforeValidator(rank)] = Field(
        default=None,
        description="put it out as a LoRA adapter of this rank, or of its own rank; default: as a whole model",
    )
    format: Literal["peft", "diffusers", "kohya"] = Field(
        default="peft", description="layout of that adapter, as continual export --format takes it"
    )
    repo: str | None = Field(
        default=None, description="repo (org/name) the view is released to, with the other settings of release"
    )
    canary: CanarySettings | None = Field(
        default=None, description="put the view out as a canary first, and watch it, as release.canary: a table"
    )


class HookSettings(BaseModel):
    """Who is told when a new merged model is out."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    kind: Literal["sglang", "sglang-lora", "vllm", "vllm-lora", "http", "command"]
    url: str | None = Field(
        default=None,
        description="where the server listens, as http://127.0.0.1:30000; of an http hook, what is posted to",
    )
    command: tuple[str, ...] = Field(default=(), description="program and arguments of a command hook; no shell")
    secret: Secret = Field(
        default=None,
        description="http: what is posted is signed with it, after Standard Webhooks: whsec_ and Base64, or env:NAME",
    )
    view: str | None = Field(
        default=None, description="views whose publications it is told of, a name or a glob; default: the merge alone"
    )
    after: Literal["current", "release", "candidate"] | None = Field(
        default=None,
        description="what it comes after: the link current (the default where it is set), the release on the Hub, or "
        "either of them going out as a canary",
    )
    timeout: Annotated[float, Field(gt=0)] = Field(default=60.0, description="seconds one try may take")
    tries: Annotated[int, Field(ge=1)] = Field(default=3, description="how often it is tried")
    name: str = Field(
        default="continual",
        description="sglang-lora, vllm-lora: the name under which the adapter is served, with {view} in it or without; "
        "default for views: the view's",
    )
    rank: Annotated[int, Field(ge=1)] = Field(
        default=16, description="sglang-lora, vllm-lora: rank of the adapter that is made of a whole model"
    )

    @property
    def serves_lora(self) -> bool:
        """Whether the server is given an adapter."""
        return self.kind in ("sglang-lora", "vllm-lora")

    def served_as(self, view: str | None) -> str:
        """The name under which the adapter of a view, or of the merge, is served."""
        name = self.name if view is None or "name" in self.model_fields_set else "{view}"
        return name.replace("{view}", view or "")


class Settings(BaseModel):
    """Everything a user can set. Sizes are bytes (`4GB` is understood), times are seconds."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    state: Home = Field(
        default=Path("state"),
        description="directory of the state, or s3://BUCKET/PREFIX, gs://… or az://… on an object store",
    )
    lease: Annotated[float, Field(ge=2, le=3600)] = Field(
        default=LEASE,
        description="on an object store, for how long a writer or reader that is not heard of keeps what it holds",
    )
    watch: Paths = Field(default=(), description="folders in which fine-tunes are published")
    rule: str | None = Field(
        default=None,
        description="fold rule that init takes, by default tsv-flow, of adapters tsv-even; "
        "a state made under another is refused",
    )
    reading: str | None = Field(
        default=None,
        description="rule that reads the merge, in place of the one that the state says; "
        "continual rules lists which can read which state",
    )
    options: dict[str, object] = Field(
        default_factory=dict, description="fold-time options of the rule; a state made with others is refused"
    )
    before: Texts | None = Field(
        default=None,
        description="transforms of each task vector before its fold, as drop:rate=0.9; "
        "a state made with others is refused",
    )
    weight: Annotated[str, BeforeValidator(str)] = Field(
        default="1", description="weight of a model: a number, FILE.json:KEY or metadata:KEY"
    )
    weights: dict[str, float] = Field(
        default_factory=dict, description="globs over model names and the weight of those they match"
    )
    select: Literal["none", "relevance", "frank-wolfe"] | None = Field(
        default=None,
        description="whether candidates wait for rounds that choose; default: none; on a frank-wolfe state: that",
    )
    objective: str | None = Field(
        default=None, description="what is good: causal-lm, classification, heads, or module:function"
    )
    rows: Paths = Field(default=(), description="calibration rows, one JSONL file for each task")
    heads: Paths = Field(
        default=(), description="prompts of the labels, one JSON file for each of rows, for the objective heads"
    )
    rounds: Annotated[RoundSettings, BeforeValidator(pairs)] = Field(
        default_factory=RoundSettings, description="how rounds choose: a table, or key=value pairs"
    )
    hub: Annotated[HubSettings, BeforeValidator(pairs)] = Field(
        default_factory=HubSettings,
        description="what is taken from the Hugging Face Hub: a table, or key=value pairs",
    )
    release: Annotated[ReleaseSettings, BeforeValidator(pairs)] = Field(
        default_factory=ReleaseSettings,
        description="where the merge is published on the Hub: a table, or key=value pairs",
    )
    views: dict[str, ViewSettings] = Field(
        default_factory=dict, description="readings with names of their own, each put out by itself: tables by name"
    )
    hooks: tuple[HookSettings, ...] = Field(default=(), description="who is told when a new merge is out: tables")
    webhook_secret: Secret = Field(
        default=None, description="what the Hub sends as X-Webhook-Secret; without it there is no /webhook"
    )
    promote_token: Secret = Field(
        default=None, description="what POST /promote has to bring as its bearer token; without it there is no /promote"
    )
    admin_token: LongSecret = Field(
        default=None, description="lets who brings it give commands over HTTP; else nobody can"
    )
    sources: Annotated[dict[str, dict[str, object]], BeforeValidator(by_name)] = Field(
        default_factory=dict, description="settings of any other source: tables by its name, or name.key=value pairs"
    )
    settle: Seconds = Field(default=5.0, description="how long a model's files must be still before it is taken")
    rescan: Annotated[float, Field(gt=0)] = Field(
        default=30.0, description="how often a part of the folders is looked at whatever the kernel tells"
    )
    nested: bool = Field(
        default=False,
        description="also take models that lie in a model's folder, and checkpoints of a run (checkpoint-N)",
    )
    base: File | None = Field(default=None, description="where the base is now, if it was moved since init")
    device: Annotated[str, Field(pattern=r"^(auto|cpu|cuda(:\d+)?)$")] = Field(
        default="auto", description="auto, cpu, cuda or cuda:N"
    )
    workers: Annotated[int, Field(ge=0)] = Field(default=0, description="tensors folded at a time; 0: one per core")
    memory: Bytes | None = Field(
        default=None, description="bytes the tensors in flight may take; default: half of what the machine has free"
    )
    executor: Literal["local", "ray"] = Field(
        default="local", description="who works on tensors: threads of this process, or a Ray cluster"
    )
    ray: Annotated[RaySettings, BeforeValidator(pairs)] = Field(
        default_factory=RaySettings,
        description="the cluster, and what an order asks of it: a table, or key=value pairs",
    )
    keep: Annotated[int, Field(ge=1)] = Field(default=3, description="generations kept besides the tagged ones")
    keep_bytes: Bytes | None = Field(
        default=None,
        description="what these may take on the disk, as 40GB; the one in force stays; default: any amount",
    )
    updates: Literal["refuse", "add"] = Field(
        default="refuse", description="what to do with new files at a place that was folded before"
    )
    missing: Literal["refuse", "unchanged"] = Field(
        default="refuse", description="what a tensor that a fine-tune lacks means"
    )
    vocab: Literal["refuse", "common-rows", "by-token"] = Field(
        default="refuse", description="what to do with vocabularies of another size or order"
    )
    lineage: Literal["name", "shapes"] = Field(
        default="name", description="whether an adapter that names another base than the state's is refused"
    )
    tied: Literal["refuse", "both", "untie"] = Field(
        default="refuse", description="what a change of one of two tied tables (embedding, head) means"
    )
    max_base_ratio: Annotated[float, Field(gt=0)] = Field(
        default=0.9, description="largest task-vector norm, as a multiple of the base's norm"
    )
    max_mean_ratio: Annotated[float, Field(gt=1)] = Field(
        default=8.0,
        description="largest task-vector norm, as a multiple of the median of those in the merge",
    )
    gates: Annotated[dict[str, dict[str, object]], BeforeValidator(by_name)] = Field(
        default_factory=dict, description="settings that one gate has: tables by its name, or name.key=value pairs"
    )
    evaluation: EvaluationSettings = Field(
        default=EvaluationSettings(), description="what is asked about the merge before a fold is committed: a table"
    )
    signing: SigningSettings = Field(
        default=SigningSettings(), description="how what goes out is signed: a table; default: it is not"
    )
    notify: NotifySettings = Field(
        default=NotifySettings(), description="which people are told of what: a table; default: nobody is"
    )
    otlp: str | None = Field(
        default=None,
        description="where spans of folds, exports, releases and hooks are sent (OTLP over HTTP); default: nowhere",
    )
    bom: bool = Field(default=False, description="write a bill of materials (CycloneDX) beside each continual.json")
    host: str = Field(default="127.0.0.1", description="address the service listens on")
    port: Annotated[int, Field(ge=0, le=65535)] = Field(
        default=8321, description="port of the service; 0 takes a free one"
    )
    allow_remote: bool = Field(default=False, description="listen on an address that other machines reach")
    allowed_hosts: Texts = Field(
        default=(), description="names by which the service may be asked, besides localhost, addresses and host"
    )
    current: File | None = Field(
        default=None, description="a link that is kept pointing at an export of the newest merged model"
    )
    tokenizer: str = Field(
        default="base",
        description="whose tokenizer and chat template an export has: base, a model in the merge, or a directory",
    )
    drain: Seconds = Field(default=30.0, description="how long a stop waits for the fold under way before giving it up")
    log_file: File | None = Field(
        default=None, description="where log lines go in place of standard error; it may be rotated"
    )
    log_json: bool | None = Field(default=None, description="JSON log lines; default: when the output is no terminal")
    log_level: Literal["debug", "info", "warning", "error"] = Field(
        default="info", description="least level that is logged"
    )

    @model_validator(mode="after")
    def _lent(self) -> Self:
        """The place of the state knows how long a lease is."""
        if isinstance(self.state, ObjectPath) and self.state.objects.lease != self.lease:
            object.__setattr__(self, "state", where(str(self.state), self.lease))
        return self
