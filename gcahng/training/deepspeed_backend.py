"""The backend of several ranks under DeepSpeed's ZeRO stages 0, 1 and 2: one engine for each trained part.

An engine here does two things: it averages the part's gradients over the ranks (the gradient rule:
`gcahng.distributed`), and it moves the part's optimiser, whose state stages 1 and 2 divide among the ranks. Forward and
backward passes do not go through it: parts run as in one process, and a loss is differentiated as it is. So one
backward pass may reach several parts, a part may run any number of times, and weights can be read at any time.

Engines would otherwise send each gradient off as it comes, in the order of the backward pass; here they hold them until
the parts are about to move (`coalesce_grad_reduction`). That leaves no overlap of sending with computing, and until
then memory for whole gradients in stage 2; in return the order is the same on all ranks, and what a pass does not
reach is known: ZeRO takes a missing gradient for zero, by which AdamW would decay the parameter.

Not averaged: what modules with `own_rows = True` hold (class shards; a part, or within one): each rank has other rows,
and the module has done the division itself.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.optim import Optimizer

from gcahng.distributed import Ranks
from gcahng.errors import ConfigError
from gcahng.training.backend import PlainBackend, Precision, gradients_of, own_tensors
from gcahng.training.deepspeed_checks import check_engine, check_precision, check_trained
from gcahng.training.deepspeed_state import Layout, check_zero_optimizer, gathered_state, load_gathered_state
from gcahng.training.launched import Launched
from gcahng.training.optimizers import ALL_PASSES, PassGate, obeys_gate

if TYPE_CHECKING:
    from accelerate import Accelerator


class DeepSpeedBackend(PlainBackend):
    """ZeRO-0, 1 or 2, as the launcher's DeepSpeed settings say; fp32 weights, autocast for bf16."""

    def __init__(
        self,
        modules: Mapping[str, nn.Module],
        optimizers: Mapping[str, Optimizer],
        gates: Mapping[str, PassGate],
        *,
        launched: Launched,
        precision: Precision = "fp32",
        deferred_checks: bool = False,
    ) -> None:
        """Make the engines: rank 0's weights and buffers become every rank's; all ranks call it.

        Args:
            modules: Parts by name, already on `launched.device`. Which parameters require gradients is settled here.
            optimizers: By part name; a part without parameters has none. In stages 1 and 2 they hold this rank's
                partitions from here on.
            gates: The pass gate of each optimiser.
            launched: With an accelerator that has a DeepSpeed plugin (`deepspeed_plugin`).
            precision: Of matrix products; weights are float32.
            deferred_checks: As for `PlainBackend`.
        Raises:
            ConfigError: fp16, or something that ZeRO cannot move or this version of DeepSpeed does otherwise.
        """
        check_precision(precision)
        super().__init__(
            modules,
            optimizers,
            gates,
            device=launched.device,
            precision=precision,
            deferred_checks=deferred_checks,
            ranks=launched.ranks,
        )
        accelerator = launched.accelerator
        assert accelerator is not None
        self._engines: dict[str, PartEngine] = {}
        try:
            self._make_engines(accelerator)
        except BaseException:
            self.close()
            raise

    def _make_engines(self, accelerator: "Accelerator") -> None:
        for name, module in self.modules.items():
            own = {id(tensor) for tensor in own_tensors(module).values()}
            if name in self.optimizers and any(id(p) not in own for p in module.parameters()):
                self._engines[name] = PartEngine(
                    name, module, self.optimizers[name], self.gates[name], accelerator, self.ranks
                )
            # An engine sends the parameters that it is made of.
            for tensor in [*module.buffers(), *(() if name in self._engines else module.parameters())]:
                if id(tensor) not in own:
                    dist.broadcast(tensor.detach(), 0, group=self.ranks.group)

    def step(self, names: Sequence[str], reach: str) -> None:
        engines = {name: self._engines[name] for name in names if name in self._engines}
        for name in names:
            if name in self.gates:
                self.gates[name].active = reach
        try:
            reached = self._reached(engines.values())
            for engine in engines.values():
                engine.average(reached)
            super().step(names, reach)
        finally:
            for engine in engines.values():
                engine.drop_gradients()

    def _reached(self, engines: "Iterable[PartEngine]") -> set[int]:
        """Ids of the shared parameters that have a gradient on some rank."""
        parameters = [parameter for engine in engines for parameter in engine.parameters]
        flags = self.ranks.host_max([float(parameter.grad is not None) for parameter in parameters])
        return {id(parameter) for parameter, flag in zip(parameters, flags, strict=True) if flag}

    def _check_gradients(self, optimizers: Mapping[str, Optimizer], reach: str) -> None:
        self.checks.gradients(
            {
                name: self._engines[name].gradients() if name in self._engines else gradients_of(optimizer)
                for name, optimizer in optimizers.items()
            },
            reach,
        )
        if not all(obeys_gate(optimizer) for optimizer in optimizers.values()):
            self.checks.settle()

    def _move(self, optimizer: Optimizer) -> None:
        engine = next((engine for engine in self._engines.values() if engine.optimizer is optimizer), None)
        if engine is None:
            super()._move(optimizer)
            return
        with _gated(optimizer, self.checks.gate):
            engine.move()

    def optimizer_state(self, name: str) -> dict[str, Any]:
        engine = self._engines.get(name)
        return super().optimizer_state(name) if engine is None else engine.optimizer_state()

    def load_optimizer_state(self, name: str, state: dict[str, Any]) -> None:
        engine = self._engines.get(name)
        if engine is None:
            super().load_optimizer_state(name, state)
        else:
            engine.load_optimizer_state(state)

    def close(self) -> None:
        """Take every engine down: a process that ends with one of them alive may abort."""
        for engine in self._engines.values():
            engine.close()


class PartEngine:
    """One part's engine: averages its gradients and moves its optimiser."""

    def __init__(
        self,
        name: str,
        module: nn.Module,
        optimizer: Optimizer,
        gate: PassGate,
        accelerator: "Accelerator",
        ranks: Ranks,
    ) -> None:
        """Give the part's shared parameters to a new engine, and take rank 0's values of them.

        Raises:
            ConfigError: See `DeepSpeedBackend`.
        """
        plugin = accelerator.state.deepspeed_plugin
        self.name = name
        self.stage: int = plugin.deepspeed_config["zero_optimization"]["stage"]
        self.optimizer = optimizer
        self.gate = gate
        self.ranks = ranks
        own = {id(tensor) for tensor in own_tensors(module).values()}
        self.layout = Layout.of(optimizer, own)
        check_trained(name, module, optimizer, self.stage)
        self._names = {id(parameter): key for key, parameter in module.named_parameters()}
        self._moving: set[int] = set()
        self._moves_rows = False
        self._closed = False
        self._engine = self._built(module, own, accelerator)
        try:
            self._take_over()
            self._try_average()
        except BaseException:
            self.close()
            raise

    def _take_over(self) -> None:
        """Look whether the engine is as expected, and arrange the optimiser's groups around it."""
        optimizer = self.optimizer
        check_engine(self.name, self._engine, optimizer, self.stage)
        if self.stage > 0:
            check_zero_optimizer(self.name, self._zero, self.layout)
            self._zero._coalesce_grad_reduction = True
        self._flat: list[Tensor] = [group["params"][0] for group in optimizer.param_groups] if self.stage > 0 else []
        for number, group in enumerate(optimizer.param_groups):
            whole, rows = self.layout.groups[number], self.layout.own[number]
            group["params"] = [self._flat[number], *rows] if self.stage > 0 else list(whole)
        optimizer.register_step_pre_hook(self._keep_still)

    @property
    def parameters(self) -> list[nn.Parameter]:
        """The parameters whose gradients are averaged."""
        return [parameter for group in self.layout.trained for parameter in group]

    @property
    def _zero(self) -> Any:
        return self._engine.optimizer

    def _built(self, module: nn.Module, own: set[int], accelerator: "Accelerator") -> Any:
        """An engine of a list of the shared parameters: of the module it needs no more."""
        shared = [parameter for parameter in module.parameters() if id(parameter) not in own]
        for number, group in enumerate(self.optimizer.param_groups):
            group["params"] = list(self.layout.trained[number])
            if not group["params"]:
                # DeepSpeed would drop the group, and with it what belongs to it by number.
                group["params"] = [nn.Parameter(torch.zeros(1, device=shared[0].device))]
                shared += group["params"]
        # Only `accelerator.backward` would use it; with several engines there is none to be used.
        accelerator.deepspeed_engine_wrapped = None
        with _sent_from_rank_0([parameter for parameter in shared if parameter.dim() == 0], self.ranks):
            return accelerator.prepare(nn.ParameterList(shared), self.optimizer)[0]

    def average(self, reached: set[int]) -> None:
        """Average the gradients of the groups that this pass moves, and forget the others'; all ranks call it.

        Args:
            reached: Ids of the parameters that have a gradient on some rank.
        Raises:
            ConfigError: Only some parameters of a group are reached: ZeRO moves all of it or nothing.
        """
        self._moving = {number for number in range(len(self.layout.groups)) if self._is_reached(number, reached)}
        self._moves_rows = any(row.grad is not None for rows in self.layout.own for row in rows)
        for number, parameters in enumerate(self.layout.trained):
            for parameter in parameters:
                if number not in self._moving:
                    parameter.grad = None
                elif parameter.grad is None and id(parameter) in reached:
                    parameter.grad = torch.zeros_like(parameter)  # only other ranks have one
        if not self._moving:
            return
        self._reduce()
        for parameter in self.parameters if self.stage == 0 else ():
            if parameter.grad is not None and id(parameter) not in reached:
                parameter.grad = None  # DeepSpeed has made it, of zeros

    def _reduce(self) -> None:
        """Average the gradients that there are."""
        if self.stage == 0:
            self._engine.allreduce_gradients()
            return
        with self._engine.coalesce_grad_reduction():
            """The gradients are there already; at the end of the block they are reduced."""
        self._zero._coalesce_grad_reduction = True

    def _try_average(self) -> None:
        """Average once what is known: ranks' numbers from 1 on, as gradients of a backward pass.

        What this class uses of DeepSpeed besides its documented methods may be there in another version and do
        something else: reduce during the backward pass, for example, and then again.

        Raises:
            ConfigError: Something else came out; the same on all ranks.
        """
        groups = {number: group for number, group in enumerate(self.layout.trained) if group}
        if not groups:
            return
        sums = [parameter.sum() for parameter in self.parameters]
        torch.autograd.backward(sums, [torch.full_like(one, self.ranks.rank + 1) for one in sums])
        self._reduce()
        # In stages 1 and 2 each rank has its partitions, filled up with zeros; in stage 0 everything.
        held = [float(sum(part.double().sum() for part in self._held(number))) for number in groups]
        found = held if self.stage == 0 else self.ranks.host_sum(held)
        self.drop_gradients()
        mean = (self.ranks.size + 1) / 2
        means = [total / sum(p.numel() for p in group) for total, group in zip(found, groups.values(), strict=True)]
        if any(self.ranks.host_max([abs(one - mean) > 1e-5 * mean for one in means])):
            raise ConfigError(
                f"DeepSpeed's engine of `{self.name}` does not average gradients as expected: the ranks' numbers 1 to "
                f"{self.ranks.size} gave {means}, by parameter group. Use DeepSpeed 0.19.8, or DDP."
            )

    def _held(self, number: int) -> Sequence[Tensor]:
        """The averaged gradients of a group that this rank holds."""
        if self.stage > 0:
            return self._zero.averaged_gradients.get(number) or ()
        return [p.grad for p in self.layout.trained[number] if p.grad is not None]

    def _is_reached(self, number: int, reached: set[int]) -> bool:
        """Whether this pass moves the shared parameters of a group."""
        parameters = self.layout.trained[number]
        missed = [self._names[id(parameter)] for parameter in parameters if id(parameter) not in reached]
        reach = self.optimizer.param_groups[number].get("reach", ALL_PASSES)
        if len(missed) == len(parameters) or not self.gate.is_open(reach):
            return False
        if missed and self.stage > 0:
            raise ConfigError(
                f"{len(missed)} of {len(parameters)} parameters of group {number} of `{self.name}` have no gradient in "
                f"the {self.gate.active} pass, the first being `{missed[0]}`: ZeRO would take it for zero and decay "
                "them. Freeze what nothing uses (`requires_grad_(False)`), or use stage 0 or DDP."
            )
        return True

    def gradients(self) -> list[Tensor]:
        """What the next move goes by, as far as this rank moves it."""
        if self.stage == 0:
            return gradients_of(self.optimizer)
        found = [row.grad for rows in self.layout.own for row in rows if row.grad is not None]
        for number in self._moving:
            partition = self._zero.averaged_gradients.get(number)
            if not partition:
                raise ConfigError(
                    f"DeepSpeed holds no averaged gradients of group {number} of `{self.name}` before its move, so "
                    "they cannot be checked. Use DeepSpeed 0.19.8, or DDP."
                )
            found += partition
        return found

    def move(self) -> None:
        """Move what the last `average` has found to be reached; all ranks call it."""
        if self._moving:
            if self.stage > 0:
                # The module's own weights are what moves, also after someone has written to them.
                self._zero.refresh_fp32_params()
            self._engine.step()
        elif self._moves_rows:
            self.optimizer.step()

    def _keep_still(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        """Before a move: no gradient, not even of zeros, for the partitions of groups that are not reached."""
        for number, flat in enumerate(self._flat):
            if number not in self._moving:
                flat.grad = None

    def drop_gradients(self) -> None:
        """Forget all gradients, averaged ones too."""
        self.optimizer.zero_grad(set_to_none=True)
        for parameter in self.parameters:
            parameter.grad = None
        if self.stage > 0:
            self._zero.zero_grad(set_to_none=True)
            for number in self._zero.averaged_gradients:
                self._zero.averaged_gradients[number] = None

    def optimizer_state(self) -> dict[str, Any]:
        """As one process's optimiser has it; all ranks call it, before `close`."""
        assert not self._closed, "a closed engine no longer knows where its partitions lie"
        if self.stage == 0:
            return self.optimizer.state_dict()
        return gathered_state(self.optimizer, self.layout, self.ranks)

    def load_optimizer_state(self, state: Mapping[str, Any]) -> None:
        """Go on from what one process's optimiser, or `optimizer_state` of any number of ranks, gave."""
        if self.stage == 0:
            self.optimizer.load_state_dict(dict(state))
        else:
            load_gathered_state(self.name, self.optimizer, self.layout, state)

    def close(self) -> None:
        """Take the engine down, once."""
        if not self._closed:
            self._closed = True
            self._engine.destroy()


@contextmanager
def _sent_from_rank_0(single_numbers: Sequence[nn.Parameter], ranks: Ranks) -> Iterator[None]:
    """Within it, an engine that is built leaves these parameters alone: it fails to send tensors without dimensions."""
    for parameter in single_numbers:
        dist.broadcast(parameter.data, 0, group=ranks.group)
        parameter.ds_optim_param = True  # type: ignore[attr-defined]  # DeepSpeed's mark of what it must not send
    try:
        yield
    finally:
        for parameter in single_numbers:
            del parameter.ds_optim_param  # type: ignore[attr-defined]


@contextmanager
def _gated(optimizer: Optimizer, gate: Tensor | None) -> Iterator[None]:
    """Within it, an optimiser that can moves only while the gate of deferred checks is open."""
    if gate is None or not obeys_gate(optimizer):
        yield
        return
    optimizer.found_inf = gate  # type: ignore[attr-defined]
    try:
        yield
    finally:
        del optimizer.found_inf  # type: ignore[attr-defined]
