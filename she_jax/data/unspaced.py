"""Words of Japanese and Chinese, which are written without spaces: where one begins and ends.

A change of script or a particle bounds a word. Where neither does, it is not taken for one.
"""

import functools
import re
from collections.abc import Iterator

HIRAGANA = "\u3041-\u309f"
KATAKANA = "\u30a1-\u30f4\u30f7-\u30fa\u30fc\uff66-\uff9f"
HAN = "\u3400-\u9fff々ヶヵ"
CJK = f"{HIRAGANA}{KATAKANA}{HAN}"
_SCRIPTS = {"hiragana": HIRAGANA, "katakana": KATAKANA, "han": HAN, "digit": "0-9"}
_PARTICLES = "のをにはがとでもへや"
_MIN_HEAD = 3  # katakana of a compound's last part, and of what is before it


def unspaced_hits(text: str, word: str, *, heads: bool) -> Iterator[tuple[int, int]]:
    """Yields where a text has a word that is bounded on both sides.

    Args:
      text: a folded text.
      word: a folded word of two characters or more; of a shorter one nothing is yielded.
      heads: also count a word that ends a compound, and so names what the compound is.
    """
    start = text.find(word) if len(word) > 1 else -1
    while start >= 0:
        end = start + len(word)
        before, behind = text[max(0, start - _MIN_HEAD) : start], text[end : end + 1]
        if _starts_word(word, before, heads) and _ends_word(word, behind):
            yield start, end
        start = text.find(word, start + 1)


def _starts_word(word: str, before: str, heads: bool) -> bool:
    script = _script(word[0])
    if not before or _script(before[-1]) != script:
        return script != "hiragana" or not before or _script(before[-1]) != "han"
    if script == "hiragana":
        return before[-1] in _PARTICLES
    same = sum(_script(character) == script for character in before)
    return heads and (
        script == "han" or (script == "katakana" and min(len(word), same) >= _MIN_HEAD)
    )


def _ends_word(word: str, behind: str) -> bool:
    following = _script(behind) if behind else ""
    if following == "hiragana":
        return behind in _PARTICLES
    return not behind or following != _script(word[-1])


@functools.lru_cache(maxsize=1 << 14)
def _script(character: str) -> str:
    return next((k for k, v in _SCRIPTS.items() if re.match(f"[{v}]", character)), "")
