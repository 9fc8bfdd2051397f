"""The commands that look after the files of a state: whether they are whole, what to do when they are not, a copy."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from continual.cli import console, opened
from continual.cli.flags import OPENING, Flags, takes
from continual.errors import Misconfigured
from continual.outside import counted
from continual.texts import size

if TYPE_CHECKING:
    from collections.abc import Sequence

    from continual.state.backup import BackupReport
    from continual.state.damage import RepairPlan

app = typer.Typer(rich_markup_mode=None)


@app.command(name="verify")
@takes(*OPENING)
def verify_(
    signature: Annotated[
        Path | None,
        typer.Option("--signature", help="Of this model directory the signature, and nothing of the state."),
    ] = None,
    key: Annotated[
        list[str] | None, typer.Option("--key", help="With --signature: file of a public key (PEM); repeatable.")
    ] = None,
    root: Annotated[
        list[str] | None,
        typer.Option("--root", help="With --signature: file of a root certificate (PEM); repeatable."),
    ] = None,
    identity: Annotated[
        str, typer.Option("--identity", help="With --signature: who signed by Sigstore.", show_default=False)
    ] = "",
    issuer: Annotated[str, typer.Option("--issuer", help="Who vouches for that identity.", show_default=False)] = "",
    *,
    flags: Flags,
) -> None:
    """Read every file of the state and compare it with its receipt, record or checksum; name what does not belong to
    it. With --signature: whether a model directory is signed by one of those who are named."""
    if signature is not None:
        return _signature(signature, (tuple(key or ()), tuple(root or ()), identity, issuer), json=flags.json)
    if key or root or identity or issuer:
        raise Misconfigured("--key, --root, --identity and --issuer say who signed: name what, by --signature")
    from continual import api

    with console.progress() as progress:
        found = api.verify(opened.settings(flags).state, progress=progress)
    if flags.json:
        console.emit({"ok": not found.findings, **found._asdict()})
    else:
        for finding in found.findings:
            console.warn(finding)
        if found.strays:
            console.table(("stray", "size", "what"), [(s.path, size(s.nbytes), s.what) for s in found.strays])
        bad = f"damaged: {counted(len(found.findings), 'finding')}; 'continual repair --dry-run' says what is whole"
        console.say(bad if found.findings else "clean: every byte is as it was written")
    raise typer.Exit(4 if found.findings else 0)


def _signature(directory: Path, trusted: tuple[tuple[str, ...], tuple[str, ...], str, str], *, json: bool) -> None:
    """Says by whom a model directory is signed. Raises Refuse and Misconfigured."""
    from continual.publish.folder import provenance_in
    from continual.signing.trust import Trusted, verify_directory

    who = Trusted(*trusted)
    who.check("--signature")
    found = verify_directory(directory, who)
    there = provenance_in(directory)
    if json:
        console.emit({"by": found.by, "files": found.files, "state": there.get("state"), "seq": there.get("seq")})
        return
    console.say(f"{directory}: signed by {found.by}, {found.files} files, each as it was signed")
    if "seq" in there:
        console.say(
            f"It says that it is record {there['seq']} of the state {there.get('state')}, and that is signed, too."
        )


@app.command()
@takes(*OPENING)
def repair(
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print what would be lost and change nothing.")] = False,
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Do not ask.")] = False,
    *,
    flags: Flags,
) -> None:
    """Follow what is whole in a damaged state: the newest record that its chain of records leads to, with a whole
    generation. Says first what that loses; moves the old files aside, and deletes nothing."""
    from continual import api, texts

    state = opened.settings(flags).state
    with console.progress() as progress:
        plan = api.look_repair(state, progress=progress)
    if not flags.json:
        _plan_told(plan)
    commit = why = None
    if plan.findings and not dry_run:
        if not yes:
            console.must_be_asked(f"{state}: a repair to record {plan.to} loses what is printed above")
            told = (
                f"lost: {counted(len(plan.lost), 'record')}; undone: {counted(len(plan.undone), 'fold')}. "
                if flags.json
                else ""
            )
            console.must_agree(f"{told}Go on?")
        with console.progress() as progress:
            commit = api.repair(state, plan, progress=progress)
        why = _unreadable(flags)
    if flags.json:
        record = None if commit is None else texts.record(commit)
        console.emit({"plan": plan, "record": record} | ({} if why is None else {"unreadable": why}))
    elif commit is not None:
        console.say(f"Repaired, as record {commit.seq}: {commit.entry.message}")
        if why is not None:
            console.warn(f"what is in the merge now cannot be read as it is to be: {why}")


def _unreadable(flags: Flags) -> str | None:
    """Why nothing can be read after a repair: how a merge is read does not go back with it."""
    from continual.errors import Misconfigured

    with opened.merge(flags) as merge:
        try:
            merge.check_readable()
        except Misconfigured as error:
            return str(error)
    return None


def _plan_told(plan: RepairPlan) -> None:
    """What a repair does, and what it loses."""
    if not plan.findings:
        console.say("Nothing is damaged: there is nothing to repair")
        return
    _list("damaged", plan.findings)
    console.say(f"Can be followed: the records up to {plan.last}, and the merge of record {plan.to}")
    _list("lost", plan.lost)
    _list("folds undone ('continual retry' has them folded again)", plan.undone)
    _list("folds in the merge again", plan.again)
    _list("tags that go", plan.tags)
    _list("generations that cannot be gone back to", plan.generations)
    _list("tags written anew", plan.tag_files)
    _list("moved aside", plan.aside)
    if not plan.loses:
        console.say("Nothing is lost")


def _list(what: str, lines: Sequence[str]) -> None:
    if lines:
        console.say(f"{what} ({len(lines)}):")
        for line in lines:
            console.say(f"  {line}")


@app.command()
@takes(*OPENING)
def backup(
    directory: Annotated[str, typer.Argument(help="Where the backup is, or is to be: outside of the state.")],
    copy: Annotated[bool, typer.Option("--copy", help="Copy every file, also where hard links are possible.")] = False,
    verify: Annotated[
        bool, typer.Option("--verify/--no-verify", help="Read every byte of the backup when it is made.")
    ] = True,
    clone: Annotated[
        bool, typer.Option("--as-clone", help="Give the copy an id of its own: it goes on as another state.")
    ] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print what would be copied and write nothing.")] = False,
    *,
    flags: Flags,
) -> None:
    """Copy the state to a directory, or bring the backup there up to date; a daemon may write to the state meanwhile.
    What is in the backup already is not copied again."""
    from continual import api
    from continual.state.backup import Wish

    wish = Wish(copy=copy, check=verify, clone=clone, dry_run=dry_run)
    with console.progress() as progress:
        report = api.backup(opened.settings(flags).state, directory, wish, progress=progress)
    if flags.json:
        console.emit(report)
    else:
        _backup_told(report, dry_run)


def _backup_told(found: BackupReport, dry_run: bool) -> None:
    new = f"{found.records} new records, {len(found.generations)} new generations of {size(found.nbytes)}"
    if dry_run:
        console.say(f"{found.directory} would be at record {found.head}: {new}")
        return
    console.say(f"{found.directory} is at record {found.head}, id {found.id}: {new}")
    console.say(
        f"{found.linked} files are hard links to the state, {found.copied} are copies ({size(found.copied_bytes)}); "
        + ("every byte was read again" if found.checked else "nothing was read again")
    )
    if found.linked:
        console.say("Hard links are no protection against damage of this disk: use --copy, or another disk, for that")
