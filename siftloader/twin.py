"""The live twin: module shells that share a model's weights, cut to its first layers.

    twin = Twin(model, Exit(layer=1, layers=12, cuts={"bert.encoder.layer": 1}))
    twin.refresh()                                   # take over what changed since
    logits = twin.logits((), {"input_ids": ids})     # [P, T, V]

A twin is a tree of new module shells for everything the model's own ``forward`` reaches. A shell shares
its live module's parameters and buffers by reference, has its own ``training=False``, its own children
and a copy of the hooks (which do run: sharded models live by them), and the layer stacks keep their first
layers only. No weight is copied, unless to a ``device`` of its own, and the live model may run elsewhere
meanwhile. Building a twin draws no random number; where the model's forward does, even in eval mode, the
streams are put back after it.

Letters: P samples, T positions, H hidden size, V vocabulary, M wanted positions.
"""

from __future__ import annotations

import copy
import functools
import pickle
import random
import threading
import traceback
import warnings
import weakref
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from types import MethodType
from typing import Any, cast, final

import numpy as np
import torch
from torch import Tensor, nn

from siftloader.compiled import Compiled
from siftloader.deferred import Deferred, Deferring, Undeferred
from siftloader.errors import ScoringError
from siftloader.fused import LinearHead
from siftloader.replica import Replica, check_copyable
from siftloader.sharded import check_root, gathered, is_fsdp1, is_spread, rows_of, silence, whole
from siftloader.stack import Exit, unwrap


# Elements of logits alive at a time: 256 MiB of float32, whatever P, T and V are.
CHUNK_ELEMENTS = 1 << 26
# Positions at which a head is compared with the whole model: few, as the logits of all are copied for that.
COMPARED = 256
# Runs after which it is clear that nobody asks for the head at some positions only: a loss is listened to.
UNCAPTURED = 8
# What a shell has for itself; everything else in a module's __dict__ is taken over as it is. The hooks are
# copied: a hook that a library installs on a shell must not fire on the live module.
OWN = {"_modules", "_buffers", "training", "_compiled_call_impl"}
# What a forward may write into without replacing it. A shell gets copies at every refresh.
CONTAINERS = {list, dict, set}
SHARED = OWN | {"_parameters", "_non_persistent_buffers_set"}  # but of torch's own
HOOKS = (
    "_forward_hooks",
    "_forward_hooks_with_kwargs",
    "_forward_hooks_always_called",
    "_forward_pre_hooks",
    "_forward_pre_hooks_with_kwargs",
)


def rows_at_a_time(width: int) -> int:
    """How many rows of ``width`` logits may be alive together."""
    return max(1, CHUNK_ELEMENTS // width)


class Twin:
    """The shells of one moment's module tree, and the few among them that have a forward of their own."""

    def __init__(
        self,
        root: nn.Module,
        where: Exit,
        compile: bool | str = False,  # noqa: A002
        device: torch.device | None = None,
    ) -> None:
        check_root(root)
        if device is not None:
            check_copyable(root.modules())
        self._replica = None if device is None else Replica(device)
        self._identity = _identity(root)
        self._live = list(root.modules())  # kept alive, so that an id is never used again
        memo: dict[int, nn.Module] = {}
        self._layers: list[nn.Module] = []  # the live ones: no twin may run them
        for path, kept in where.cuts.items():
            # children() would count a shared layer once
            layers = [
                each for each in root.get_submodule(path)._modules.values() if each is not None
            ]
            self._layers += [unwrap(each) for each in layers]
            # Whoever holds the dropped layers elsewhere finds the live ones, and the tripwire.
            memo |= {id(each): each for each in layers[kept:] if each not in layers[:kept]}
        for path, kept in where.cuts.items():
            _shell(root.get_submodule(path), memo, children=kept)
        self._root = _shell(root, memo)
        self._settings = [
            (live := root.get_submodule(path), memo[id(live)], values)
            for path, values in where.settings.items()
        ]
        self._shells = [(each, memo[id(each)]) for each in self._live if id(each) in memo]
        self._shells = [(live, shell) for live, shell in self._shells if live is not shell]
        for live, shell in self._shells:
            silence(live, shell)
        self._is_open = False
        self._moves = any(
            map(is_fsdp1, self._live)
        )  # weights to other attributes when they are gathered
        self._seen = [dict(live.__dict__) for live, _ in self._shells]
        self._memo = memo
        self._mutated: set[tuple[int, str]] | None = None  # (shell, buffer); unknown before a run
        self._watched: set[tuple[Any, ...]] = set()  # the kinds of calls of which one was watched
        self._spoiled = False
        self._draws = False  # whether the forward was seen to draw random numbers
        heads, trunks, self._guessed = _heads_and_trunks(root, list(where.cuts))
        self._vocabulary = _width(heads[-1]) if heads else 0
        self._heads = [_Gather(memo[id(module)]) for module in heads]
        # Those that are handed the logits, or what holds them.
        self._around = [memo[id(each)] for each in _ancestors(root, heads[-1])] if heads else []
        # Those that may be: a cap, or what the head is made of. Neither layers nor embeddings.
        before = [*trunks.values(), *map(root.get_submodule, where.cuts)]
        others = {id(part) for each in before for part in each.modules()}
        self._beside = [
            shell
            for live, shell in self._shells
            if id(live) not in others and not isinstance(live, nn.Embedding)
        ]
        self._beside = [each for each in self._beside if each not in self._around]
        self._trunks = {path: _Replay(memo[id(module)]) for path, module in trunks.items()}
        self._compile = compile
        kept_layers = (memo[id(root.get_submodule(path))]._modules.values() for path in where.cuts)
        self._kept = [each for layers in kept_layers for each in layers if each is not None]
        self._quick: list[_Quick] = []  # what is compiled
        self._apart: dict[tuple[int, str], Tensor] = {}  # buffers while it is held
        self._runs, self._thread = 0, threading.get_ident()
        self._training = root.training
        self._copied: list[dict[str, Tensor | None]] = []  # buffers of the replica, as fetched
        if self._replica:
            self._part_from_live(self._replica)

    def is_of(self, root: nn.Module) -> bool:
        """Whether these are still shells of the very modules, forwards and hooks of ``root``."""
        return self._identity == _identity(root)

    def shell_of(self, live: nn.Module) -> nn.Module | None:
        """The shell of a live module, None where the cut forward does not know it."""
        return self._memo.get(id(live))

    def refresh(self) -> None:
        """Take over plain attributes that changed on the live modules, and their buffers of now.

        Of lists, dicts and sets the shells get shallow copies: what a forward collects there (the losses
        of a router) is not for the loop.
        """
        self._training = self._live[0].training
        lent: dict[int, Any] = {}  # modules that share a list share its copy, too
        for (live, shell), seen in zip(self._shells, self._seen, strict=True):
            if seen.keys() != live.__dict__.keys():
                for name in seen.keys() - live.__dict__.keys() - OWN:
                    shell.__dict__.pop(name, None)
                    del seen[name]
            for name, value in live.__dict__.items():
                if type(value) in CONTAINERS and name not in SHARED:
                    if id(value) not in lent:
                        lent[id(value)] = self._placed(_rebound(value.copy(), self._memo))
                    shell.__dict__[name], seen[name] = lent[id(value)], value
                elif value is not seen.get(name, shell) and name not in OWN:
                    shell.__dict__[name] = self._placed(_rebound(value, self._memo))
                    seen[name] = value
        for live, shell, values in self._settings:
            # Past the config's own checks: a broken number of groups is no config that one could build.
            config = copy.copy(live.config)
            vars(config).update(values)
            shell.__dict__["config"] = config
        if self._replica:
            self._lend_copies(self._replica)
        self._lend_buffers()

    def hold(self) -> None:
        """Take over all of now as ``refresh`` does, and copy every buffer: the live model may write them meanwhile."""
        self.refresh()
        if self._replica:
            # What a training forward writes; the weights it leaves alone are fetched when it runs.
            self._replica.fetch(weights=False)
            return
        for number, (_, shell) in enumerate(self._shells):
            shell.__dict__["_buffers"] = {
                name: None if buffer is None else self._apart_from(buffer, (number, name))
                for name, buffer in shell._buffers.items()
            }

    def _apart_from(self, buffer: Tensor, place: tuple[int, str]) -> Tensor:
        # In the same memory each time: a CUDA graph would be recorded anew for every other address.
        room = self._apart.get(place)
        known = None if room is None else (room.shape, room.dtype, room.device)
        if room is None or known != (buffer.shape, buffer.dtype, buffer.device):
            room = self._apart[place] = buffer.clone()
        elif room is not buffer:
            room.copy_(buffer.detach())
        return room

    def fetch(self, held: bool = False) -> None:
        """Copy the weights and buffers of now; where nothing is copied they are the live ones anyway.

        While it is ``held``, of the weights alone.
        """
        if self._replica:
            self._replica.fetch(others=not held)
            self._lend_buffers()

    @property
    def copied_bytes(self) -> int:
        """What copies of weights and buffers take; none where these are shared."""
        return self._replica.bytes if self._replica else 0

    def _part_from_live(self, replica: Replica) -> None:
        # Tensors that a module keeps without registering them, too: tables that a forward looks up.
        for _, shell in self._shells:
            for name, value in list(shell.__dict__.items()):
                if name not in SHARED and name not in HOOKS:
                    shell.__dict__[name] = replica.placed(value)

    def _placed(self, value: Any) -> Any:
        return self._replica.placed(value) if self._replica else value

    def _lend_copies(self, replica: Replica) -> None:
        def copied(tensors: Mapping[str, Tensor | None]) -> dict[str, Tensor | None]:
            return {n: None if each is None else replica.of(each) for n, each in tensors.items()}

        for live, shell in self._shells:
            shell.__dict__["_parameters"] = copied(live._parameters)
        self._copied = [copied(live._buffers) for live, _ in self._shells]

    @property
    def pending(self) -> bool:
        """Whether something of what ran last is to be compiled when it comes again, in the thread it ran in."""
        return any(part.pending for part in self._quick) or bool(self._compile and not self._quick)

    @property
    def draws(self) -> bool:
        """Whether its forward was seen to draw random numbers."""
        return self._draws

    def lend_again(self) -> None:
        """Put back what a forward wrote to its own buffers, where the live ones are not looked at."""
        if self._replica:
            self._lend_buffers()

    def _lend_buffers(self) -> None:
        # What a forward writes to (counters, running means) is lent as a copy. Which buffers those are
        # shows the first run, for which all are copied.
        for number, (live, shell) in enumerate(self._shells):
            if not live._buffers:
                continue
            shell.__dict__["_buffers"] = {
                name: buffer.clone()
                if buffer is not None
                and (self._mutated is None or (number, name) in self._mutated)
                else buffer
                for name, buffer in (
                    self._copied[number] if self._copied else live._buffers
                ).items()
            }

    def _note_mutated(self, before: dict[tuple[int, str], tuple[Tensor, int]]) -> None:
        after = self._buffers()
        self._mutated = {
            key
            for key, (buffer, version) in before.items()
            if key not in after or after[key][0] is not buffer or after[key][1] != version
        }
        self._lend_buffers()

    def _buffers(self) -> dict[tuple[int, str], tuple[Tensor, int]]:
        return {
            (number, name): (buffer, _version(buffer))
            for number, (_, shell) in enumerate(self._shells)
            for name, buffer in shell._buffers.items()
            if buffer is not None
        }

    def _parameters(self) -> list[Tensor]:
        found = (each for _, shell in self._shells for each in shell._parameters.values())
        return [each for each in found if each is not None]

    def _tensors(self) -> Iterator[Tensor]:
        yield from self._parameters()
        yield from (buffer for buffer, _ in self._buffers().values())

    def _cuda_devices(self) -> list[torch.device]:
        return [each for each in {p.device for p in self._parameters()} if each.type == "cuda"]

    @contextmanager
    def opened(self) -> Iterator[None]:
        """Weights that FSDP spreads over ranks, gathered once for all that runs inside.

        Collectives happen at the beginning, always the same: what runs then needs none.
        """
        if self._is_open:
            yield
            return
        self._is_open = True
        try:
            with gathered(live for live, _ in self._shells):
                if self._moves:
                    self.refresh()
                yield
        finally:
            self._is_open = False

    def logits(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
        """The logits in what the cut forward returns, [P, T, V] or [P, C]."""
        return whole(logits_of(self.run(args, kwargs)))

    def run(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """What the cut forward returns; ScoringError if it reached the live model's layers.

        The random streams of the training loop are afterwards what they were.
        """
        with self.opened():
            return self._run(args, kwargs)

    def _run(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        # A model may do other things in another mode, and where it is given its labels.
        kind = (self._training, *kwargs)
        watched = kind in self._watched
        if self._replica:
            self._replica.wait()
        self._runs += 1
        if self._runs > UNCAPTURED and threading.get_ident() == self._thread:
            self.compile_layers()
        if watched and not self._draws:
            return self._root(*args, **kwargs)
        output, drew = self._unmoved(
            lambda: self._root(*args, **kwargs) if watched else self._watch(kind, args, kwargs)
        )
        if drew and not self._draws:
            self._draws = True
            warnings.warn(
                f"the forward of {type(self._root).__name__} draws random numbers in evaluation mode "
                f"too (noise, or dropout without training=self.training), so its scores are random; "
                f"the random streams of the training loop are put back after each run",
                stacklevel=2,
            )
        return output

    def _unmoved(self, run: Callable[[], Any]) -> tuple[Any, bool]:
        # What it returns, and whether it moved a random stream, which is put back.
        streams = _Streams(self._cuda_devices())
        try:
            output = run()
        finally:
            drew = streams.put_back()
        return output, drew

    @contextmanager
    def eagerly(self) -> Iterator[None]:
        """Nothing compiled runs, or counts as seen, inside: to watch or to compare a few rows by."""
        was = [each.pause(True) for each in self._quick]
        try:
            yield
        finally:
            for each, paused in zip(self._quick, was, strict=True):
                each.pause(paused)

    def _watch(self, kind: tuple[Any, ...], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        # A forward bound to the live object would run every layer, and in training mode, without an
        # error: the first call of each kind watches the live modules.
        before, weights = self._buffers(), [(each, _version(each)) for each in self._parameters()]
        try:
            with _tripwire(self._live, self._layers), self.eagerly():
                output = self._root(*args, **kwargs)
        except (IndexError, KeyError) as error:
            # Not where an id is beyond the embedding, say: that is the caller's own error.
            if not traceback.extract_tb(error.__traceback__)[-1].filename.endswith("container.py"):
                raise
            raise ScoringError(
                f"the forward of {type(self._root).__name__} failed without the layers beyond the exit "
                f"({type(error).__name__}: {error}): it asks for layers by number, or keeps them in "
                f'several lists; pass exit_layer="full"'
            ) from error
        self._spoiled |= any(_version(each) != version for each, version in weights)
        if self._spoiled:
            raise ScoringError(
                f"the forward of {type(self._root).__name__} changes the model's weights in evaluation "
                f"mode, so it cannot be scored, and they are no longer what they were: restore them"
            )
        self._watched.add(kind)
        if self._mutated is None:
            self._note_mutated(before)
        return output

    def captures_at(
        self,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        positions: Tensor,
        starts: list[int],
        length: int,
    ) -> bool | None:
        """Find the outermost head that may run on single positions; True if it agrees with the whole.

        Compared once, on up to two rows, with the output of the untouched twin. None where these rows
        cannot tell.
        """
        if not self._heads:
            return False
        samples, few = len(starts) - 1, min(2, len(starts) - 1)
        args = tuple(_first_rows(value, samples, few) for value in args)
        kwargs = {name: _first_rows(value, samples, few) for name, value in kwargs.items()}
        whole = self.logits(args, kwargs)
        flat = whole.ndim == 2 and length > 1 and len(whole) == few * length
        if whole.ndim != 3 and not flat:
            return False
        check_shape(whole, few, length)
        wanted = positions[: starts[few]]
        if wanted.numel() == 0:  # the first rows have no label: any position will do
            wanted = torch.arange(min(8, length), device=whole.device)
        wanted = wanted[:: -(-len(wanted) // COMPARED)]
        expected = whole.reshape(-1, whole.shape[-1]).index_select(0, wanted)
        told = ~expected.isnan().any(1)
        if not bool(told.any()):
            return None
        while self._heads:
            try:
                found = torch.cat(list(self.head_chunks(args, kwargs, wanted, few * length)))
            except torch.OutOfMemoryError:
                raise
            except Exception:  # what follows the head wants all positions: a loss of its own, say
                found = torch.full_like(expected, torch.nan)
            fits = found.shape == expected.shape and agree(found[told], expected[told])
            if self._heads[0].fired and fits:
                self._keep_outermost_trunk()
                return True
            self._heads.pop(0).restore()
        if self._guessed:
            return False
        warnings.warn(
            "the model's head does not act on single positions (or is not called as a module), so "
            "scoring runs it on all of them: right, but slower",
            stacklevel=2,
        )
        return False

    def in_one_go(self, count: int) -> bool:
        """Whether ``head_chunks`` runs the layers once for ``count`` positions."""
        return bool(self._trunks) or count <= rows_at_a_time(self._vocabulary)

    def _keep_outermost_trunk(self) -> None:
        # Some models reach past the outer modules (OPT calls `model.decoder`): those never fire. What
        # fired within a trunk that fired is not asked again.
        kept: dict[str, _Replay] = {}
        for path, trunk in self._trunks.items():
            if trunk.fired and not any(path.startswith(f"{outer}.") for outer in kept):
                kept[path] = trunk
            else:
                trunk.restore()
        self._trunks = kept
        # The trunks, embeddings and masks and all; where a forward calls its layers itself, each of those.
        if self._compile and kept:
            for part in self._quick:
                part.restore()
            self._compile_parts([*kept.values()])
        self.compile_layers()

    def compile_layers(self) -> None:
        """Compile the layers, if that was asked for and no larger part was found that holds them."""
        if not self._compile or self._quick:
            return
        if not self._kept:
            self._compile = False
            warnings.warn(
                f"compile: no stack of layers was found in {type(self._root).__name__}, so it is scored without",
                stacklevel=2,
            )
        self._compile_parts([*map(_Layer, dict.fromkeys(self._kept))])

    def _compile_parts(self, parts: list[_Quick]) -> None:
        if parts and any(map(is_spread, self._live)):
            self._compile = False
            warnings.warn(
                "compile: the weights lie on several ranks, and what gathers them cannot be compiled with "
                "them, so the model is scored without",
                stacklevel=2,
            )
            return
        self._quick, told = parts, set[str]()
        for part in parts:
            part.compile(self._compile, self._unmoved, self._tensors, told)

    def head_chunks(
        self, args: tuple[Any, ...], kwargs: dict[str, Any], positions: Tensor, places: int
    ) -> Iterator[Tensor]:
        """Logits at some of P * T ``places``: the first chunk runs trunk and head, the others only the head."""
        head, size = self._heads[0], rows_at_a_time(self._vocabulary)
        head.places = places
        for trunk in self._trunks.values():
            trunk.forget()
        try:
            for chunk in torch.split(positions, size):
                head.positions = chunk
                logits = self.logits(args, kwargs)
                yield logits.reshape(-1, logits.shape[-1])
                for trunk in self._trunks.values():
                    trunk.replay()
        finally:
            head.positions = None
            for trunk in self._trunks.values():
                trunk.forget()

    def deferred(
        self, args: tuple[Any, ...], kwargs: dict[str, Any], positions: Tensor, places: int
    ) -> tuple[Tensor, LinearHead]:
        """What the logits at ``positions`` are made of, [m, H] and a head, instead of the logits.

        The output embedding is not multiplied with. What the model does with its logits afterwards is read
        from this very run, so that it is that of the moment. Raises Undeferred where it is more than a
        linear head can say, and where hooks would be handed logits that do not exist. The weights of the
        head are those of the model, gathered: use it within ``opened()``.
        """
        if self._is_heard():
            raise Undeferred("a hook is to see the logits")
        head, output = self._heads[0], self._heads[-1]
        head.positions, head.places, output.defers = positions, places, True
        try:
            logits = self.logits(args, kwargs)
        except torch.OutOfMemoryError:
            raise
        except Exception as error:
            # Whatever a forward says of logits that have no data; other faults of it show with real ones, too.
            raise Undeferred(str(error)) from error
        finally:
            head.positions, output.defers = None, False
            for trunk in self._trunks.values():
                trunk.forget()
        if not isinstance(logits, Deferred):
            raise Undeferred(f"{type(self._root).__name__} makes its logits in another way")
        made = logits.made
        if logits.shape[:-1].numel() != len(positions):
            raise Undeferred(f"{tuple(logits.shape)} logits for {len(positions)} positions")
        return made.hidden, made.head()

    def _is_heard(self) -> bool:
        around = any(_hooks(each, "_forward_hooks") for each in self._around)
        beside = any(_hooks(each, "_forward_hooks", "_forward_pre_hooks") for each in self._beside)
        return around or beside or bool(nn.modules.module._global_forward_hooks)


@final
class _Streams:
    """The global random streams of this moment: torch's, those of CUDA devices, random's and NumPy's.

    All states lie on the host, those of CUDA devices too. Other threads draw from the same streams.
    """

    def __init__(self, devices: list[torch.device]) -> None:
        self._devices = devices
        self._torch = [torch.get_rng_state(), *map(torch.cuda.get_rng_state, devices)]
        self._python = random.getstate()
        # A dict around an array: only as bytes it can be compared.
        self._numpy = pickle.dumps(np.random.get_state(legacy=False))  # noqa: NPY002

    def put_back(self) -> bool:
        """Set them to what they were; whether one of them had moved."""
        now = _Streams(self._devices)
        torches = all(map(torch.equal, self._torch, now._torch))
        if torches and self._python == now._python and self._numpy == now._numpy:
            return False
        torch.set_rng_state(self._torch[0])
        for state, device in zip(self._torch[1:], self._devices, strict=True):
            torch.cuda.set_rng_state(state, device)
        random.setstate(self._python)
        np.random.set_state(pickle.loads(self._numpy))  # noqa: NPY002
        return True


def _version(tensor: Tensor) -> int:
    return 0 if tensor.is_inference() else tensor._version  # those keep no count


def _identity(root: nn.Module) -> list[Any]:
    # Module objects, forwards on instances and hooks: where one of them changed, new shells are needed.
    return [
        (
            id(module),
            id(module.__dict__.get("forward")),
            *(key for name in HOOKS for key in module.__dict__[name]),
        )
        for module in root.modules()
    ]


class _Overridden:
    """A shell that runs ``run`` instead of its forward, until it is restored."""

    def __init__(self, shell: nn.Module) -> None:
        self.fired = False
        self._shell, self._own = shell, shell.__dict__.get("forward")
        self._forward = shell.forward
        shell.__dict__["forward"] = self.run

    def run(self, *args: Any, **kwargs: Any) -> Any:
        raise AssertionError("each kind has its own")

    def restore(self) -> None:
        if self._own is None:
            del self._shell.__dict__["forward"]
        else:
            self._shell.__dict__["forward"] = self._own


class _Gather(_Overridden):
    """Sees only the wanted positions: [P, T, H] in, [1, m, V] out; deferred logits if it ``defers``.

    Or [P * T, H] in, [m, V] out, where the model has them in one row.
    """

    positions: Tensor | None = None
    places = 0  # P * T
    defers = False

    def run(self, *args: Any, **kwargs: Any) -> Any:
        if self.positions is not None and not kwargs and self._are_all(*args):
            self.fired = True
            rows = rows_of(args[0], self.positions)
            args = (rows if args[0].ndim == 2 else rows[None],)
        with Deferring() if self.defers else nullcontext():
            return self._forward(*args, **kwargs)

    def _are_all(self, hidden: Any = None, *others: Any) -> bool:
        known = isinstance(hidden, Tensor) and hidden.ndim in (2, 3) and not others
        return known and hidden.shape[:-1].numel() == self.places


def _hooks(shell: nn.Module, *names: str) -> bool:
    hooks = [each for name in names for each in shell.__dict__[name].values()]
    # FSDP's cast, which stands in the place of its hook, is no listener.
    own = silence.__module__
    return any(getattr(getattr(each, "func", None), "__module__", "") != own for each in hooks)


class _Quick(_Overridden):
    """Runs the shell's own forward, compiled once that was asked for."""

    _paused = False
    _compiled: Compiled | None = None

    def compile(self, mode: bool | str, *others: Any) -> None:
        self._compiled = Compiled(self._forward, mode, *others)

    def pause(self, paused: bool) -> bool:
        was, self._paused = self._paused, paused
        return was

    @property
    def pending(self) -> bool:
        return self._compiled is not None and self._compiled.pending

    def own(self, *args: Any, **kwargs: Any) -> Any:
        run = self._forward if self._compiled is None or self._paused else self._compiled
        return run(*args, **kwargs)


class _Layer(_Quick):
    """One layer of a model whose forward calls its layers itself."""

    def run(self, *args: Any, **kwargs: Any) -> Any:
        return self.own(*args, **kwargs)


class _Replay(_Quick):
    """Remembers its output, so that later chunks need not compute it again.

    Not where one forward calls it twice: which output would it be?
    """

    replaying = False
    _calls = 0
    _output: Any = None

    def run(self, *args: Any, **kwargs: Any) -> Any:
        if self.replaying:
            return self._output
        self._output, self.fired = self.own(*args, **kwargs), True
        self._calls += 1
        return self._output

    def replay(self) -> None:
        self.replaying = self._calls == 1

    def forget(self) -> None:
        self._output, self._calls, self.replaying = None, 0, False


def _width(head: nn.Module) -> int:
    # Of its output; a weight that is flattened and cut among ranks does not tell.
    found = getattr(head, "out_features", None)
    return found if isinstance(found, int) else int(cast(Tensor, head.weight).shape[0])


def _heads_and_trunks(
    root: nn.Module, stacks: list[str]
) -> tuple[list[nn.Module], dict[str, nn.Module], bool]:
    # The modules around the output embedding that hold no layers, outermost first, and beside them the
    # modules that hold the layers: BERT's `cls`, `cls.predictions`, its decoder; `bert`, `bert.encoder`.
    # And whether the model does not say which it is, so that it is the widest matrix outside of the stacks.
    output = getattr(root, "get_output_embeddings", lambda: None)()
    names = {id(module): name for name, module in root.named_modules()}
    if guessed := output is None:
        linear = [
            each
            for name, each in root.named_modules()
            if isinstance(each, nn.Linear)
            and not any(f"{name}.".startswith(f"{stack}.") for stack in stacks)
        ]
        output = max(reversed(linear), key=_width, default=None)
    if not stacks or not isinstance(getattr(output, "weight", None), Tensor):
        return [], {}, guessed
    head = names[id(output)].split(".")
    ways = [stack.split(".") for stack in stacks]
    common = [
        next((n for n, (a, b) in enumerate(zip(head, way, strict=False)) if a != b), None)
        for way in ways
    ]
    if None in common:
        return [], {}, guessed
    first = max(cast(list[int], common))
    heads = [root.get_submodule(".".join(head[:n])) for n in range(first + 1, len(head) + 1)]
    paths = [".".join(way[:n]) for way in ways for n in range(first + 1, len(way))]
    trunks = {path: root.get_submodule(path) for path in sorted({*paths}, key=len)}
    return heads, trunks, guessed


def _ancestors(root: nn.Module, module: nn.Module) -> list[nn.Module]:
    # Of the module, and itself.
    path = next(name for name, each in root.named_modules() if each is module).split(".")
    return [root, *(root.get_submodule(".".join(path[: n + 1])) for n in range(len(path)))]


def _shell(
    module: nn.Module, memo: dict[int, nn.Module], children: int | None = None
) -> nn.Module:
    """A new object of the same class that shares everything but its children, mode and hooks.

    ``children`` keeps the first so many of them.
    """
    if id(module) in memo:
        return memo[id(module)]
    if type(module).__name__ == "OptimizedModule":  # a compiled child would run the live graph
        memo[id(module)] = _shell(cast(nn.Module, module._orig_mod), memo)
        return memo[id(module)]
    shell = memo[id(module)] = object.__new__(type(module))
    state = dict(module.__dict__)
    state["_modules"] = {
        name: None if child is None else _shell(child, memo)
        for name, child in list(module._modules.items())[:children]
    }
    state["_buffers"] = dict(module._buffers)
    state["training"] = False
    state["_compiled_call_impl"] = None
    shell.__dict__ = state
    if "forward" not in state and _uncompiled(type(module).forward) is not None:  # in its class
        state["forward"] = MethodType(type(module).forward, module)
    for name, value in list(state.items()):
        if name not in OWN:
            state[name] = _rebound(value, memo)
    return shell


def _rebound(value: Any, memo: dict[int, nn.Module]) -> Any:
    # What refers to live modules refers to their shells. A forward patched onto the instance is bound
    # to the live object and would run all its layers; a list of modules would run them in train mode.
    if isinstance(value, MethodType) and isinstance(value.__self__, nn.Module):
        function = _uncompiled(value.__func__) or value.__func__
        return MethodType(function, _shell(value.__self__, memo))
    if isinstance(value, functools.partial):
        args = [_rebound(each, memo) for each in value.args]
        named = {name: _rebound(each, memo) for name, each in value.keywords.items()}
        return functools.partial(_rebound(value.func, memo), *args, **named)
    if isinstance(inner := _uncompiled(value), MethodType):
        return _rebound(inner, memo)  # model.forward = torch.compile(model.forward)
    if isinstance(value, OrderedDict):
        return value.copy()  # hooks
    if isinstance(value, weakref.ref) and isinstance(held := value(), nn.Module):
        return weakref.ref(_shell(held, memo))
    if isinstance(value, nn.Module):
        return _shell(value, memo)
    if isinstance(value, (list, tuple)) and _any_module(value):
        return type(value)(_rebound(each, memo) for each in value)
    if isinstance(value, dict) and _any_module(value.values()):
        return {name: _rebound(each, memo) for name, each in value.items()}
    return value


def _uncompiled(function: Any) -> Any:
    # What torch.compile made it of: a shell that ran compiled code would cost the live model graphs.
    if getattr(function, "_torchdynamo_disable", False):
        return None
    return getattr(function, "_torchdynamo_orig_callable", None)


def _any_module(values: Iterable[Any]) -> bool:
    # By the types, of which there are few: this runs at every refresh, and a vocabulary is a dict, too.
    return any(issubclass(each, nn.Module) for each in {*map(type, values)})


@contextmanager
def _tripwire(live: list[nn.Module], layers: list[nn.Module]) -> Iterator[None]:
    thread = threading.get_ident()  # the model may well run in another one

    def refuse(module: nn.Module, args: Any) -> None:
        if threading.get_ident() == thread and (module.training or module in layers):
            raise ScoringError(
                f"scoring reached a layer beyond the exit, or one that trains: a "
                f"{type(module).__name__} of the live model itself. Where forward was replaced on the "
                f"instance by a closure or a lambda, the early exit would silently be the whole "
                f"model, with its dropout; assign a method (types.MethodType) or subclass the model"
            )

    hooks = [
        module.register_forward_pre_hook(refuse)
        for module in live
        if type(module).__name__ != "OptimizedModule"  # its shell is that of the module within
    ]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def logits_of(output: Any) -> Tensor:
    """The logits in a model's output: alone, first in a tuple, or under their usual name."""
    # Beside a loss, `outputs` are predictions (cramming); elsewhere they may be hidden states.
    named = ("outputs",) if isinstance(output, Mapping) and "loss" in output else ()
    for name in ("logits", "prediction_logits", *named):
        found = output.get(name) if isinstance(output, Mapping) else getattr(output, name, None)
        if isinstance(found, Tensor):
            return found
    if isinstance(output, (tuple, list)):
        tensors = [each for each in output if isinstance(each, Tensor) and each.ndim >= 2]
        output = tensors[0] if tensors else output
    if not isinstance(output, Tensor) or output.ndim < 2 or not output.is_floating_point():
        raise ScoringError(
            f"the model's forward returned {type(output).__name__} without logits; it must return "
            f"logits [P, T, V] or [P, C], alone, first in a tuple, or as `.logits`; else pass "
            f"score_fn="
        )
    return output


def check_shape(logits: Tensor, samples: int, length: int) -> None:
    """Raise ScoringError unless there is one prediction per label position."""
    if logits.shape[:-1].numel() == samples * length:
        return
    last = " (this forward predicts only the last position: name the targets it wants, as in "
    last += '{"idx": x, "targets": y} with labels="targets")' if logits.ndim == 3 else ""
    raise ScoringError(
        f"the model's output {tuple(logits.shape)} does not have one prediction per label "
        f"({samples} rows x {length}){last if logits.shape[1:-1] == (1,) else ''}; labels of a "
        f"language model are [P, T] beside logits [P, T, V], of a classifier [P] beside [P, C]; for "
        f"anything else pass score_fn="
    )


def _first_rows(value: Any, samples: int, few: int) -> Any:
    if isinstance(value, Tensor):
        return value[:few] if value.ndim and value.shape[0] == samples else value
    return value


def agree(found: Tensor, expected: Tensor) -> bool:
    """Whether logits [m, V] are the same but for rounding in their precision; waits for the device.

    Measured by class: one that is ruled out by a huge number does not hide how far the others are apart.
    """
    if found.shape != expected.shape:
        return False
    parts = [*zip(torch.split(found, COMPARED), torch.split(expected, COMPARED), strict=True)]
    size = torch.stack([e.masked_fill(e.isinf(), 0).abs().amax(0).float() for _, e in parts])
    size = size.amax(0)
    usual = size.median()
    usual = torch.where(usual > 0, usual, size.amax()).clamp_min(1e-6)
    allowed = torch.finfo(expected.dtype).eps ** 0.5 * torch.maximum(size, usual)  # float32: 3e-4
    apart = ((f - e).abs().masked_fill(f == e, 0).float() for f, e in parts)
    return all(bool((each <= allowed).all()) for each in apart)
