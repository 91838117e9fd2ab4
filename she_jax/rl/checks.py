"""Arguments of the core, refused in words before they become NaN or an error deep inside JAX.

One rule holds for every public function of ``she_jax.rl``: an array is a numpy or a JAX array with
the shape and the kind of dtype that the signature states. Lists are refused, since their dtype and
shape would be a guess; where floats are expected, integers and booleans are read as floats.

Shapes and dtypes are checked whenever Python runs the function, so also while JAX traces it, and
cost nothing in compiled code. Values (ranges, step ids, NaN) are checked where they are known: not
inside ``jit``, and not on arrays of which other processes hold a part. Every error is a ValueError.
"""

import dataclasses
import functools
import inspect
import operator
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NoReturn, ParamSpec, TypeVar, get_args

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jaxtyping import AbstractArray, Array, Bool, Int

from she_jax.types import Advantages, LMOutput

Args = ParamSpec("Args")
Result = TypeVar("Result")

RECORDS = "she_jax."  # the fields of the package's dataclasses are checked as arguments are
FINITE = "(-inf, inf)"
LETTERS = {
    "B": "rollouts, a row each",
    "S": "steps",
    "T": "tokens of a row",
    "V": "the vocabulary",
    "D": "the width of the model",
    "M": "pairs",
}


def checked(function: Callable[Args, Result]) -> Callable[Args, Result]:
    """The function, which refuses arrays that its annotations do not describe.

    A letter of a shape means the same number in all arguments of a call, the fields of records
    included.

    Raises:
      ValueError: with the argument, what it is, what was expected, and what to pass.
    """
    signature = inspect.signature(function)
    annotations = {name: p.annotation for name, p in signature.parameters.items()}

    @functools.wraps(function)
    def call(*args: Args.args, **kwargs: Args.kwargs) -> Result:
        try:
            arguments = signature.bind(*args, **kwargs).arguments
        except TypeError as error:
            raise TypeError(f"{function.__name__}() {error}") from None
        _check(f"{function.__name__}: ", arguments, annotations, {})
        return function(*args, **kwargs)

    return call


def check_step_ids(step_ids: Any, steps: int | None):
    """Refuses step ids below -1 and, unless ``steps`` is None, from ``steps`` on.

    Raises:
      ValueError: with the first such id and its place.
    """
    if (ids := known_values(step_ids)) is None:
        return
    wrong = ids < -1 if steps is None else (ids < -1) | (ids >= steps)
    if wrong.any():
        row, token = np.argwhere(wrong)[0]
        bound = "or more" if steps is None else f"to {steps - 1}, for the {steps} steps there are"
        raise ValueError(
            f"step_ids[{row}, {token}] is {ids[row, token]}: expected -1 (outside every step) or 0 "
            f"{bound}: number the steps from 0, in the order of the columns of their rewards"
        )


def check_range(name: str, values: Any, interval: str, mask: Any = True):
    """Refuses NaN and numbers outside of an interval, where the mask is not 0.

    Args:
      name: of the argument, for the message.
      values: a number, or an array of any shape.
      interval: such as ``[0, 1]`` or ``(0, inf)``, which has neither of its ends.
      mask: what counts, of a shape that broadcasts to that of ``values``.

    Raises:
      ValueError: with the first such number and its place.
    """
    numbers, counted = known_values(values), known_values(mask)
    if numbers is None or counted is None:
        return
    numbers = numbers.astype(np.float32)
    low, high = map(float, interval[1:-1].split(","))
    above = numbers >= low if interval[0] == "[" else numbers > low
    below = numbers <= high if interval[-1] == "]" else numbers < high
    wrong = (counted != 0) & ~(above & below)
    if wrong.any():
        place = np.argwhere(wrong)[0].tolist()
        expected = "finite number" if interval == FINITE else f"number in {interval}"
        where = "" if mask is True else ", or a mask or weight of 0 there"
        found = f"{place} is " if place else "="
        raise ValueError(f"{name}{found}{numbers[tuple(place)]}: expected a {expected}{where}")


def model_output(
    forward: Callable[..., Any], params: Any, tokens: Array, positions: Array, **more: Any
) -> Array | LMOutput:
    """What ``forward`` returns for tokens and positions [B, T], the model of an update.

    Raises:
      ValueError: if it does not take these arguments, or returns no logits [B, T, V].
    """
    try:
        output = forward(params, tokens, positions, **more)
    except TypeError as error:
        if _takes(forward, params, tokens, positions, **more):
            raise
        call = ", ".join(("params, tokens, positions", *(f"{name}=..." for name in more)))
        sharing = "; it may ignore the last two, for a group_size above 1" * ("group_size" in more)
        raise ValueError(f"{error}: forward is called as forward({call}){sharing}") from error
    logits = output.hidden if isinstance(output, LMOutput) else output
    if not isinstance(logits, jax.Array) or logits.ndim != 3 or logits.shape[:2] != tokens.shape:
        raise ValueError(
            f"forward returned {described(logits)}, expected logits [B, T, V] for the tokens "
            f"{list(tokens.shape)}, or a she_jax.LMOutput"
        )
    return output


def _takes(function: Callable[..., Any], *args: Any, **kwargs: Any) -> bool:
    """Whether the signature, where there is one, admits the arguments."""
    try:
        inspect.signature(function).bind(*args, **kwargs)
    except TypeError:
        return False
    except ValueError:  # it has no signature
        pass
    return True


def known_values(array: Any) -> np.ndarray | None:
    """The values of an array; None inside ``jit``, and where other processes hold a part."""
    if isinstance(array, Tracer):
        return None
    if isinstance(array, jax.Array) and not array.is_fully_addressable:
        return None
    return np.asarray(array)


def _check(
    place: str,
    arguments: Mapping[str, Any],
    annotations: Mapping[str, Any],
    sizes: dict[str, tuple[int, str]],
):
    """Checks each argument, and enters the size of each letter with the array that it is from."""
    for name, value in arguments.items():
        kind = annotations[name]
        if kind is int and not _is_whole(value):
            static = ", known outside of jit (static_argnames)" * isinstance(value, Tracer)
            raise ValueError(
                f"{place}{name} is {described(value)}, expected a whole number{static}"
            )
        if _is_record(kind) and not isinstance(value, kind):
            raise ValueError(
                f"{place}{name} is {described(value)}, expected a she_jax.{kind.__name__}"
                f"{_way_to(kind)}"
            )
        kinds = get_args(kind) or (kind,)
        arrays = [k for k in kinds if isinstance(k, type) and issubclass(k, AbstractArray)]
        others = tuple(k for k in kinds if k not in arrays and isinstance(k, type))
        if _is_record(type(value)) and (not arrays or isinstance(value, others)):
            fields = {field.name: field.type for field in dataclasses.fields(value)}
            values = {field: getattr(value, field) for field in fields}
            _check(f"{place}{name}.", values, fields, sizes)
        elif arrays:
            _check_array(place + name, value, arrays, others, sizes)


def _is_record(kind: Any) -> bool:
    return dataclasses.is_dataclass(kind) and getattr(kind, "__module__", "").startswith(RECORDS)


def _is_whole(value: Any) -> bool:
    try:
        operator.index(value)
    except TypeError:
        return False
    return True


def described(value: Any) -> str:
    """What a refused argument is: its value if that is short, else its kind."""
    if value is None or isinstance(value, int | float | np.number):
        return str(value)
    if isinstance(value, np.ndarray | jax.Array):
        return f"an array {list(value.shape)}"
    name = type(value).__name__
    return f"{'an' if name[0] in 'AEIOUaeiou' else 'a'} {name}"


def _way_to(kind: Any) -> str:
    return ", which estimators such as srpo_advantages return" if kind is Advantages else ""


def _way_to_array(name: str, value: Any) -> str:
    """How to get the array that was expected from what was passed."""
    if isinstance(value, Advantages):
        return ": pass what token_advantages makes of it, an advantage for each token"
    if isinstance(value, tuple) and name.endswith("logps"):
        return ": token_logps returns (logps, entropy), take [0]"
    if isinstance(value, list | tuple) or hasattr(value, "__array__"):
        return f": pass jnp.asarray({name})"
    return ""


def _check_array(
    name: str, value: Any, arrays: list[Any], others: tuple[type, ...], sizes: dict[str, Any]
):
    shapes = list(dict.fromkeys(kind.dim_str for kind in arrays))
    scalar = "" in shapes and isinstance(value, int | float | np.generic)
    if scalar or isinstance(value, others):
        return
    expected = " or ".join(f"[{', '.join(shape.split())}]" for shape in shapes)
    short = name.split()[-1]
    if not isinstance(value, np.ndarray | jax.Array):
        raise ValueError(
            f"{name} is {described(value)}, expected a numpy or JAX array {expected}"
            f"{_way_to_array(short, value)}"
        )
    kind, is_kind, cast = _kind(arrays[0])
    if not any(jnp.issubdtype(value.dtype, dtype) for dtype in is_kind):
        raise ValueError(
            f"{name} has dtype {value.dtype}, expected {kind}: pass {short}.astype({cast})"
        )
    if "..." in shapes:
        return
    letters = next((s.split() for s in shapes if len(s.split()) == value.ndim), None)
    if letters is None:
        raise ValueError(
            f"{name} has shape {list(value.shape)}, expected {expected} "
            f"({_meaning(' '.join(shapes).split())})"
        )
    for letter, size in zip(letters, value.shape, strict=True):
        known, source = sizes.setdefault(letter, (size, f"{short} {list(value.shape)}"))
        if size != known:
            _refuse_size(name, value, letters, letter, known, source)


def _refuse_size(
    name: str, value: Any, letters: list[str], letter: str, known: int, source: str
) -> NoReturn:
    raise ValueError(
        f"{name} has shape {list(value.shape)}, expected [{', '.join(letters)}] with "
        f"{letter}={known} ({_meaning([letter])}), as in {source}: pass arrays of the same {letter}"
    )


def _kind(array: Any) -> tuple[str, tuple[Any, ...], str]:
    """Words for the dtypes that an annotation takes, the dtypes, and what to cast to."""
    if array.dtype is Bool:
        return "booleans", (jnp.bool_,), "bool"
    if array.dtype is Int:
        return "integers", (jnp.integer,), "jnp.int32"
    return "numbers", (jnp.floating, jnp.integer, jnp.bool_), "jnp.float32"


def _meaning(letters: Sequence[str]) -> str:
    known = [
        f"{letter}: {LETTERS[letter]}" for letter in dict.fromkeys(letters) if letter in LETTERS
    ]
    return "; ".join(known) or "a scalar"
