"""The selection of prompts: near-duplicates, surveys, thresholds and quotas, by hand."""

import math
from dataclasses import fields, replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from she_jax.filtering.near_duplicates import near_duplicates, signatures
from she_jax.filtering.records import PromptRecord, write_records
from she_jax.filtering.select import (
    DIFFICULTIES,
    REASONS,
    FilterConfig,
    Quota,
    Survey,
    difficulty,
    merge,
    path_entropy,
    select,
    survey,
    water_fill,
)

LABELS = ("", "1", "2", "3", "4")


def make_survey(count: int = 1, **columns) -> Survey:
    """Prompts of class 4 with 8 rollouts, half of them correct, but for the given columns."""
    length = max([count, *(len(x) for name, x in columns.items() if name != "kinds")])
    usual = {
        "row": np.arange(length),
        "label": [LABELS.index("4")] * length,
        "kind": [0] * length,
        "confidence": [0.5] * length,
        "rollouts": [8] * length,
        "pass_rate": [0.5] * length,
        "entropy": [1.0] * length,
        "distinct": [0.5] * length,
        "embedding": np.zeros((length, 2)),
    }
    kinds = columns.pop("kinds", ("plain",))
    dtypes = dict(
        zip(usual, ["int64", "int16", "int16", "f4", "int16", "f4", "f4", "f4", "f2"], strict=True),
        embedding="f2",
    )
    values = {n: np.asarray(columns.pop(n, x), dtypes[n]) for n, x in usual.items()}
    assert not columns
    return Survey(kinds=kinds, labels=LABELS, **values)


def random_records(count: int, seed: int = 0) -> list[PromptRecord]:
    """Records of all sorts: with and without label, confidence and rollouts."""
    rng = np.random.default_rng(seed)
    records = []
    for row in range(count):
        n = int(rng.choice([0, 4, 8]))
        right = tuple((rng.random(n) < rng.random()).tolist())
        records.append(
            PromptRecord(
                row=3 * row,
                uid=str(row),
                query=f"query {row}",
                title=f"title {row}",
                label=[None, *LABELS[1:]][rng.integers(5)],
                kind=["", "plain", "negation", "question"][rng.integers(4)],
                confidence=None if rng.random() < 0.1 else float(rng.random()),
                right=right,
                paths=tuple(f"match/{x}" for x in rng.integers(1, 5, n)),
                step_rates=(0.5, None),
                texts=tuple(" ".join("abcdef"[x] for x in rng.integers(6, size=5)) for _ in right),
                embedding=rng.normal(size=6).astype(np.float16),
            )
        )
    return records


def assert_same(a, b):
    """Two surveys or selections, to the last bit."""
    for field in fields(a):
        value, other = getattr(a, field.name), getattr(b, field.name)
        if isinstance(value, np.ndarray):
            assert value.dtype == other.dtype
            np.testing.assert_array_equal(value, other)
        else:
            assert value == other


def reasons(selection) -> list[str]:
    return [REASONS[code] for code in selection.reason]


# Measures


def test_path_entropy_by_hand():
    """Three of four take one path: -(3/4 log 3/4 + 1/4 log 1/4)."""
    assert path_entropy(["a", "b", "a", "a"]) == pytest.approx(0.5623351446188083, abs=1e-15)
    assert path_entropy(["a/-", "b/-", "c/-", "d/-"]) == pytest.approx(math.log(4), abs=1e-15)
    assert all(0 <= path_entropy(["a"] * n) < 1e-15 for n in range(1, 33))  # never a little below
    assert math.isnan(path_entropy([]))


def test_path_entropy_does_not_depend_on_names_or_order():
    assert path_entropy(list("aaabbcd")) == path_entropy(list("xyzzwww"))


def test_difficulty_buckets():
    rates = np.array([k / 6 for k in range(7)], np.float32)
    names = [DIFFICULTIES[k] for k in difficulty(rates)]
    assert names == ["hard", "hard", "medium", "medium", "easy", "easy", "easy"]


@pytest.mark.parametrize(
    ("counts", "total", "quota"),
    [
        ([5, 1, 10, 0], 9, [4, 1, 4, 0]),
        ([5, 1, 10, 0], 10, [5, 1, 4, 0]),  # one is left over: to the first that has more
        ([5, 1, 10, 0], 11, [5, 1, 5, 0]),
        ([5, 1, 10, 0], 13, [5, 1, 7, 0]),
        ([5, 1, 10, 0], 100, [5, 1, 10, 0]),  # cannot be met
        ([3, 3, 3], 2, [1, 1, 0]),
        ([3, 3], 0, [0, 0]),
        ([], 5, []),
    ],
)
def test_water_fill_by_hand(counts, total, quota):
    assert water_fill(np.array(counts, np.int64), total).tolist() == quota


@given(st.lists(st.integers(0, 50), max_size=8), st.integers(0, 300))
def test_water_fill_hands_out_all_and_evenly(counts, total):
    quota = water_fill(np.array(counts, np.int64), total)
    assert quota.sum() == min(total, sum(counts))
    short = [q for q, c in zip(quota, counts, strict=True) if q < c]
    assert all(0 <= q <= c for q, c in zip(quota, counts, strict=True))
    assert not short or max(quota) <= min(short) + 1


# Near-duplicates


def test_signatures_estimate_the_exact_jaccard_similarity():
    """Sets of 4-character runs: {abcd bcde cdef defg} and {abcd bcde cdef defx}: 3 of 5."""
    first, second = signatures(["abcdefg", "ABCdefx"])
    assert abs((first == second).mean() - 3 / 5) < 0.13  # three standard errors
    base = "waterproof running shoes for men, wide fit, size ten, dark navy with a grey sole"
    texts = [base, base + " x", base.replace("navy", "blue"), "ceramic mug with a lid"]
    shingles = [{text[i : i + 4] for i in range(len(text) - 3)} for text in texts]
    signed = signatures(texts)
    for runs, signature in zip(shingles, signed, strict=True):
        exact = len(runs & shingles[0]) / len(runs | shingles[0])
        estimate = (signature == signed[0]).mean()
        assert abs(estimate - exact) <= 3 * math.sqrt(exact * (1 - exact) / signed.shape[1]) + 1e-9


def test_signatures_of_shards_are_those_of_the_whole():
    texts = ["", "a", "Red  MUG\n", "red mug", "kırmızı kupa ☕"]
    whole = signatures(texts)
    assert whole.dtype == np.uint32
    np.testing.assert_array_equal(
        whole, np.concatenate([signatures(texts[:2]), signatures(iter(texts[2:]))])
    )
    np.testing.assert_array_equal(whole[2], whole[3])  # case and blanks do not count
    assert len(signatures([])) == 0


def test_near_duplicates_point_to_the_earliest_kept_text():
    mug = "a large red ceramic mug with a sturdy handle, for coffee, tea and much else besides"
    lamp = "a small brass desk lamp whose arm can be turned to every side, with a linen shade"
    texts = [lamp, mug, mug + ".", lamp, mug.upper(), "else", mug + "."]
    assert near_duplicates(signatures(texts), 0.9).tolist() == [-1, -1, 1, 0, 1, -1, 1]
    assert near_duplicates(signatures(texts), 0.0).tolist() == [-1] * 7
    assert near_duplicates(signatures([]), 0.9).tolist() == []
    kinds = np.array([0, 1, 1, 1, 0, 1, 1], np.uint32)  # another query is another pair
    assert near_duplicates(signatures(texts), 0.9, kinds).tolist() == [-1, -1, 1, -1, -1, -1, 1]


def test_in_a_chain_of_small_changes_texts_are_compared_with_kept_ones():
    """1 repeats 0 and is dropped. 2 agrees with 1 but not with 0, so it is kept; 3 repeats 2."""
    rng = np.random.default_rng(0)
    rows = np.tile(rng.integers(2**32, size=128, dtype=np.uint32), (4, 1))
    for k in range(1, 4):  # each differs from the one before in ten more entries of 128
        rows[k:, 10 * k : 10 * k + 10] += np.uint32(1)
    assert near_duplicates(rows, 0.9).tolist() == [-1, 0, -1, 2]
    assert near_duplicates(rows, 0.8).tolist() == [-1, 0, 0, -1]


def test_near_duplicates_equal_those_of_comparing_every_pair():
    """Near copies of a few texts, against the plain double loop; the bands may miss 1%."""
    rng = np.random.default_rng(1)
    base = rng.integers(2**32, size=(40, 128), dtype=np.uint32)
    rows = base[rng.integers(40, size=400)]
    for row in rows:
        row[rng.integers(128, size=rng.integers(0, 14))] = rng.integers(2**32)
    expected: list[int] = []
    for i, row in enumerate(rows):
        like = (j for j in range(i) if expected[j] < 0 and (rows[j] == row).mean() >= 0.9)
        expected.append(next(like, -1))
    earlier = near_duplicates(rows, 0.9)
    assert (earlier == expected).mean() > 0.98
    assert (earlier >= 0).sum() > 200


def test_copies_of_a_text_are_not_compared_pair_by_pair():
    """All pairs of 20,000 copies would be 200 million."""
    rows = np.tile(signatures(["red mug"]), (20_000, 1))
    earlier = near_duplicates(rows, 0.9)
    assert earlier[0] == -1
    assert not earlier[1:].any()


# Surveys


def test_a_survey_by_hand(tmp_path):
    measured, bare = random_records(2)
    measured = replace(
        measured,
        row=5,
        label=None,
        kind="b",
        confidence=None,
        right=(True, False, False),
        paths=("x", "y", "x"),
        texts=("a b a b", "a b", ""),
        embedding=np.array([1, 2], np.float16),
    )
    bare = replace(
        bare,
        row=2,
        label="3",
        kind="a",
        confidence=0.6,
        right=(),
        paths=(),
        texts=(),
        embedding=np.array([3, 4], np.float16),
    )
    write_records(tmp_path / "0.parquet", [measured, bare], ("a", "b"))
    surveyed = survey(tmp_path / "0.parquet")
    assert surveyed.row.tolist() == [2, 5]
    assert (surveyed.labels, surveyed.label.tolist()) == (("", "3"), [1, 0])
    assert (surveyed.kinds, surveyed.kind.tolist()) == (("a", "b"), [0, 1])
    np.testing.assert_array_equal(surveyed.confidence, np.array([0.6, np.nan], np.float32))
    assert surveyed.rollouts.tolist() == [0, 3]
    np.testing.assert_array_equal(surveyed.pass_rate, np.array([np.nan, 1 / 3], np.float32))
    entropy = math.log(3) - 2 / 3 * math.log(2)
    np.testing.assert_allclose(surveyed.entropy, [np.nan, entropy], rtol=1e-6)
    np.testing.assert_array_equal(surveyed.distinct, np.array([np.nan, 0.5], np.float32))
    assert surveyed.embedding.tolist() == [[3, 4], [1, 2]]
    assert surveyed.embedding.dtype == np.float16


def test_any_split_into_shards_in_any_order_gives_the_same(tmp_path):
    """Surveys and selections, to the last bit."""
    records = random_records(300)
    write_records(tmp_path / "all.parquet", records, ("a", "b"))
    whole = survey(tmp_path / "all.parquet")
    config = FilterConfig(
        confidence=0.9, high=0.9, size=60, clusters=4, front=("negation",), front_share=0.4, seed=3
    )
    gone = np.array([0, 9, 30, 10_000])
    expected = select(whole, config, gone)
    assert {*reasons(expected)} >= {"kept", "duplicate", "confident", "unlabeled", "easy", "quota"}
    rng = np.random.default_rng(0)
    for trial in range(5):
        order = rng.permutation(300)
        cuts = np.sort(rng.choice(np.arange(1, 300), size=1 + 3 * trial, replace=False))
        shards = []
        for k, rows in enumerate(np.split(order, cuts)):
            path = tmp_path / f"{trial}-{k}.parquet"
            write_records(path, [records[i] for i in rows], ("a", "b"))
            shards.append(survey(path))
        rng.shuffle(shards)
        half = len(shards) // 2
        merged = merge(shards) if half == 0 else merge([merge(shards[half:]), merge(shards[:half])])
        assert_same(merged, whole)
        assert_same(select(merged, config, gone[::-1]), expected)


def test_a_repeated_row_is_refused():
    with pytest.raises(ValueError, match="2 rows come twice, row 3 first"):
        merge([make_survey(row=[3, 4, 5]), make_survey(row=[1, 4, 3])])


def test_embeddings_of_two_policies_are_refused():
    other = make_survey(row=[1], embedding=np.zeros((1, 3)))
    with pytest.raises(ValueError, match=r"widths \[2, 3\]"):
        merge([make_survey(), other])
    with pytest.raises(ValueError, match=r"widths \[\]"):
        merge([])


# Selection


def test_the_first_of_several_reasons_is_reported():
    """Prompt n has reason n and all later ones, and is dropped for the first of them."""
    order = REASONS[1:8]
    faults = np.triu(np.ones((8, 8), bool))[:, :7]
    surveyed = make_survey(
        confidence=np.where(faults[:, 1], 0.95, np.nan),
        label=np.where(faults[:, 2], 0, 2),
        rollouts=np.where(faults[:, 3], 0, 8),
        pass_rate=np.where(faults[:, 4], 0.95, np.where(faults[:, 5], 0.05, 0.5)),
        entropy=np.where(faults[:, 6], 0.0, 1.0),
    )
    config = FilterConfig(confidence=0.9, low=0.1, high=0.9, min_entropy=0.5)
    selection = select(surveyed, config, np.flatnonzero(faults[:, 0]))
    assert reasons(selection) == [*order, "kept"]
    assert selection.quotas == ()
    assert selection.cluster.tolist() == [-1] * 8


def test_a_value_equal_to_a_threshold_passes():
    """1/3 as float32 is neither above nor below a threshold of 1/3."""
    rates = np.arange(4) / 3
    surveyed = make_survey(pass_rate=rates, confidence=[0.6] * 4, entropy=[math.log(3)] * 4)
    config = FilterConfig(low=1 / 3, high=2 / 3, confidence=0.6, min_entropy=math.log(3))
    assert reasons(select(surveyed, config)) == ["hard", "kept", "kept", "easy"]
    assert reasons(select(make_survey(confidence=[1.0000001]), FilterConfig())) == ["kept"]


def test_without_a_size_all_that_pass_are_kept():
    assert reasons(select(make_survey(5), FilterConfig())) == ["kept"] * 5


def test_quotas_are_even_over_class_kind_and_difficulty():
    """Cells (class 1: 9 hard; class 4: 2 hard, 30 easy), size 12: 5 + 2 + 5."""
    surveyed = make_survey(
        label=[1] * 9 + [4] * 32, pass_rate=[0.1] * 11 + [0.9] * 30, kinds=("negation",)
    )
    selection = select(surveyed, FilterConfig(size=12, clusters=0))
    kept = selection.reason == 0
    assert [kept[:9].sum(), kept[9:11].sum(), kept[11:].sum()] == [5, 2, 5]
    assert selection.quotas == (
        Quota(cell="all", wanted=12, available=41, kept=12),
        Quota(cell="class 1, negation, easy", wanted=3, available=0, kept=0),
        Quota(cell="class 1, negation, hard", wanted=3, available=9, kept=5),
        Quota(cell="class 4, negation, easy", wanted=3, available=30, kept=5),
        Quota(cell="class 4, negation, hard", wanted=3, available=2, kept=2),
    )
    assert [quota.cell[-4:] for quota in selection.unmet] == ["easy", "hard"]


def test_a_size_that_cannot_be_met_keeps_all_and_is_reported():
    selection = select(make_survey(3), FilterConfig(size=10))
    assert reasons(selection) == ["kept"] * 3
    assert selection.unmet[0] == Quota(cell="all", wanted=10, available=3, kept=3)


def test_in_a_cell_the_most_diverse_come_first():
    """Entropy first, then distinct bigrams (unknown: last), then chance."""
    surveyed = make_survey(entropy=[0, 2, 1, 2, 2], distinct=[0.9, 0.3, 0.9, np.nan, 0.4])
    for size, kept in ((1, [4]), (2, [1, 4]), (3, [1, 3, 4]), (4, [1, 2, 3, 4])):
        selection = select(surveyed, FilterConfig(size=size))
        assert np.flatnonzero(selection.reason == 0).tolist() == kept


def test_a_cell_is_even_over_its_clusters():
    """Three distant clusters of 20, 4 and 1 prompts, size 9: 4 + 4 + 1, at any entropy."""
    embeddings = np.repeat([[0, 0], [100, 0], [0, 100]], [20, 4, 1], axis=0)
    surveyed = make_survey(embedding=embeddings, entropy=[2.0] * 20 + [1.0] * 5)
    selection = select(surveyed, FilterConfig(size=9, clusters=3))
    parts = np.split(selection.cluster, [20, 24])
    assert sorted(np.unique(part).tolist() for part in parts) == [[0], [1], [2]]
    assert [(part == 0).sum() for part in np.split(selection.reason, [20, 24])] == [4, 4, 1]


def test_more_clusters_than_prompts_or_quota_are_accepted():
    selection = select(make_survey(3), FilterConfig(size=2, clusters=16))
    assert reasons(selection).count("kept") == 2
    assert (selection.cluster >= 0).all()


@pytest.mark.parametrize(
    ("front", "others", "share", "kept"),
    [
        (100, 100, 0.75, (15, 5)),
        (6, 100, 0.75, (6, 14)),  # all there are
        (100, 2, 0.75, (18, 2)),  # and what the others cannot fill
        (0, 100, 0.75, (0, 20)),
        (100, 0, 0.75, (20, 0)),
        (100, 100, 0.0, (0, 20)),
        (100, 100, 1.0, (20, 0)),
    ],
)
@pytest.mark.parametrize("balance", [True, False])
def test_kinds_in_front(front, others, share, kept, balance):
    surveyed = make_survey(kind=[1] * others + [0] * front, kinds=("negation", "plain"))
    config = FilterConfig(
        size=20, front=("negation", "question"), front_share=share, balance=balance, clusters=0
    )
    selection = select(surveyed, config)
    selected = selection.reason == 0
    assert (selected[others:].sum(), selected[:others].sum()) == kept
    total = next(quota for quota in selection.quotas if quota.cell == "kinds in front")
    assert total == Quota(
        cell="kinds in front", wanted=round(20 * share), available=front, kept=kept[0]
    )


def test_chance_depends_on_the_seed_and_the_row_and_not_on_the_order():
    """Without balance: another half for another seed; the same rows among others rank alike."""
    surveyed = make_survey(1000, entropy=np.arange(1000))
    config = FilterConfig(size=500, balance=False)
    kept = select(surveyed, config).reason == 0
    assert kept.sum() == 500
    assert 150 < kept[:500].sum() < 350
    other = select(surveyed, replace(config, seed=1)).reason == 0
    assert 150 < (kept & other).sum() < 350
    moved = make_survey(1000, row=np.arange(1000) + 500)
    again = select(moved, config).reason == 0
    assert (again[:500] == kept[500:]).mean() > 0.8


def test_the_same_survey_gives_the_same_selection(tmp_path):
    write_records(tmp_path / "0.parquet", random_records(400), ("a", "b"))
    surveyed = survey(tmp_path / "0.parquet")
    config = FilterConfig(size=50)
    assert_same(select(surveyed, config), select(surveyed, config))


@pytest.mark.parametrize(
    ("columns", "config", "words"),
    [
        (
            {"confidence": [0.9, 0.95], "pass_rate": [0.5, 0.5]},
            {"confidence": 0.8},
            r"left of 2; .* confident 2 \(confidence=0.8\)\. confidence=0.8 took the last 2: raise",
        ),
        (
            {"pass_rate": [1.0, 0.0, 0.1]},
            {"low": 0.2, "high": 0.9},
            r"easy 1 \(high=0.9\), hard 2 \(low=0.2\)\. low=0.2 took the last 2: lower it",
        ),
        ({"pass_rate": [1.0]}, {"high": 0.9}, "high=0.9 took the last 1: raise it"),
        ({"entropy": [0.0]}, {"min_entropy": 0.1}, "min_entropy=0.1 took the last 1"),
        ({"label": [0]}, {}, "the lack of labels took the last 1"),
        ({"rollouts": [0]}, {}, "the lack of rollouts took the last 1"),
        ({"row": [7]}, {}, "similarity=0.9 took the last 1: raise it, or give 0"),
    ],
)
def test_an_empty_result_names_the_threshold_that_emptied_it(columns, config, words):
    with pytest.raises(ValueError, match=words):
        select(make_survey(**columns), FilterConfig(**config), np.array([7]))


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ({"similarity": 0.3}, "similarity=0.3: expected 0, or 0.5 to 1"),
        ({"confidence": 0.0}, "confidence=0.0: expected above 0"),
        ({"low": 0.6, "high": 0.5}, "low=0.6: expected 0 to high=0.5"),
        ({"high": 1.5}, "high=1.5: expected low=0.0 to 1"),
        ({"min_entropy": -1.0}, "min_entropy=-1.0"),
        ({"size": -1}, "size=-1"),
        ({"clusters": -1}, "clusters=-1"),
        ({"front_share": 1.1}, "front_share=1.1: expected 0 to 1"),
        ({"seed": -1}, "seed=-1"),
    ],
)
def test_values_out_of_range_are_refused(config, words):
    with pytest.raises(ValueError, match=words):
        FilterConfig(**config)
