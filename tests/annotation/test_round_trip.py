"""What people say comes back whole from each format, once, merged, and with its agreement."""

import json
import random
from dataclasses import asdict, replace

import krippendorff
import pytest

from she_jax.annotation.label_studio import ITEMS, label_studio_task
from she_jax.annotation.merge import agreement, annotated_row, by_pair, consensus
from she_jax.annotation.reading import read_opinions
from she_jax.annotation.stepwise import judged_row, stepwise_row
from she_jax.annotation.tasks import (
    CORRECT,
    INCORRECT,
    Opinion,
    json_lines,
    make_task,
    read_tasks,
    task_to_json,
    time_text,
)
from she_jax.cot import CotSchema
from she_jax.data.dataset import open_split, prepare
from she_jax.data.readers.judgments import TableConfig
from she_jax.data.readers.tables import Tables
from she_jax.runs.annotate_import import import_annotations
from she_jax.types import Example, UserError

SCHEMA = CotSchema.build()
STEPS = {step.name: step for step in SCHEMA.steps}
ODD = ('mug, "red"; not <b>blue</b>', "ספל; אדום 👩‍👩‍👧", "tasse;  à café\u2009", "{{7*7}} => $x")


def task(n, seed=0):
    """A pair with the chain of a policy; the pair has a label."""
    rng = random.Random(f"{seed}/{n}")
    texts = {name: rng.choice(ODD) for name in SCHEMA.names[:-1]}
    verdicts = {s.name: rng.choice(s.verdicts) if s.verdicts else None for s in SCHEMA.steps}
    steps = [{"name": k, "text": t, "verdict": verdicts[k]} for k, t in texts.items()]
    line = {"steps": steps, "label": int(verdicts["label"]), "confidence": 0.5}
    product = {"title": f"Mug {n}", "size": "3 l", "items": rng.choice(ODD).strip()}
    example = Example(uid=f"q {n} / 0{n}", query=f"mug {n % 30}", product=product, label=4)
    return make_task(example, line | {"probabilities": None}, SCHEMA, ("", "plain", ""))


TASKS = {t.uid: t for t in map(task, range(100))}


def opinions_of(annotator, uids=tuple(TASKS), seed=0):
    """What one annotator says of all steps: verdicts, right or wrong, and items in words."""
    rng = random.Random(f"{annotator}/{seed}")
    said = []
    for n, uid in enumerate(uids):
        at = time_text(f"2026-12-01T{n // 60:02d}:{n % 60:02d}:07.25+01:00")
        for step in SCHEMA.steps:
            value = rng.choice(step.verdicts or ("", "mug; red", "ספל"))
            correct = value == TASKS[uid].step(step.name).verdict
            if not step.verdicts:
                correct = rng.random() < 0.5
            opinion = {"uid": uid, "step": step.name, "annotator": annotator, "at": at}
            said.append(Opinion(**opinion, value=value, correct=correct))
    return said


def page_lines(opinions):
    """The page's file: of a verdict it says the right one, of free text right or wrong too."""
    for opinion in opinions:
        line = {k: v for k, v in asdict(opinion).items() if v != ""}
        yield {k: v for k, v in line.items() if k != "correct" or not STEPS[opinion.step].verdicts}


def label_studio_export(opinions):
    """Label Studio's JSON: one annotation a task, the predictions beside it."""
    rows = []
    for number, (uid, said) in enumerate(by_pair(opinions).items()):
        results = []
        for o in said:
            free = not STEPS[o.step].verdicts
            choice = (CORRECT if o.correct else INCORRECT) if free else o.value
            to = f"step_{SCHEMA.names.index(o.step)}"
            region = {"id": f"r{len(results)}", "to_name": to, "origin": "manual"}
            value = {"choices": [choice]}
            results.append(
                region | {"from_name": f"human_{o.step}", "type": "choices", "value": value}
            )
            if free and o.value:
                items = {"from_name": f"{ITEMS}{o.step}", "type": "textarea"}
                results.append(region | items | {"value": {"text": [o.value]}})
        annotation = {
            "id": 7,
            "completed_by": {"id": 3, "email": said[0].annotator},
            "was_cancelled": False,
            "created_at": "2026-11-01T00:00:00.000000Z",
            "updated_at": said[0].at,
            "result": results,
        }
        canceled = annotation | {"was_cancelled": True, "completed_by": 9}
        exported = label_studio_task(TASKS[uid], SCHEMA, "model") | {"id": number}
        rows.append(exported | {"annotations": [canceled, annotation], "total_annotations": 1})
    return rows


def stepwise_lines(opinions):
    """TRL's format filled in."""
    for uid, said in by_pair(opinions).items():
        row, by_step = stepwise_row(TASKS[uid], SCHEMA), {o.step: o for o in said}
        row["labels"] = [by_step[name].correct for name in row["steps"]]
        row["truth"] = [by_step[name].value or None for name in row["steps"]]
        yield row | {"annotator": said[0].annotator, "at": said[0].at}


def write_formats(folder, opinions):
    """The three files."""
    files = [folder / name for name in ("page.jsonl", "studio.json", "stepwise.jsonl")]
    files[0].write_text(json_lines(page_lines(opinions)))
    files[1].write_text(json.dumps(label_studio_export(opinions)))
    files[2].write_text(json_lines(stepwise_lines(opinions)))
    return files


@pytest.fixture
def folder(tmp_path):
    """What ``annotate`` leaves, as far as an import reads it."""
    (tmp_path / "pairs.jsonl").write_text(json_lines(map(task_to_json, TASKS.values())))
    (tmp_path / "choice.json").write_text(json.dumps({"chain": SCHEMA.options}))
    return tmp_path


def test_a_task_is_read_as_it_was_written(folder):
    assert read_tasks(folder / "pairs.jsonl") == TASKS


def test_a_hundred_annotated_pairs_come_back_whole_from_each_format(tmp_path):
    said = opinions_of("ann@example.org")
    for file in write_formats(tmp_path, said):
        back, bad = read_opinions([file], TASKS, SCHEMA)
        assert bad == []
        assert sorted(back, key=lambda o: o.order) == sorted(said, key=lambda o: o.order), file


def test_training_reads_the_merged_table_with_every_step_label_and_annotator(folder):
    said = opinions_of("ann@example.org")
    import_annotations(folder, write_formats(folder, said))
    rows = [json.loads(line) for line in (folder / "annotated.jsonl").read_text().splitlines()]
    assert [row["uid"] for row in rows] == list(TASKS)
    options = TableConfig(path=str(folder / "annotated.jsonl"), chain=SCHEMA.options)
    dataset = prepare(Tables(data_dir=folder / "data", config=options))
    assert not dataset.bad_rows
    read = {e.uid: e for split in dataset.splits for e in open_split(dataset.path, split)}
    for uid, opinions in by_pair(said).items():
        truth = {o.step: o.value for o in opinions if o.value}
        assert read[uid].label == int(truth.pop("label"))
        assert {k: " ".join(v.split()) for k, v in read[uid].steps.items()} == truth
        assert set(read[uid].annotations) == set(truth)
        assert dict(read[uid].product)["title"] == TASKS[uid].example.product["title"]
    kept = [
        (row["uid"], o["step"], o["annotator"], o["at"]) for row in rows for o in row["annotators"]
    ]
    assert sorted(kept) == sorted((o.uid, o.step, o.annotator, o.at) for o in said)


def test_an_import_may_be_repeated_and_comes_in_any_order(folder, tmp_path_factory):
    first, second = (opinions_of(name, seed=1) for name in ("ann", "bob"))
    files = [folder / "ann.jsonl", folder / "bob.jsonl"]
    for file, said in zip(files, (first, second), strict=True):
        file.write_text(json_lines(page_lines(said)))
    names = ("imported.jsonl", "annotated.jsonl", "annotators.json", "stepwise_judged.jsonl")
    import_annotations(folder, files[:1])
    import_annotations(folder, files[1:])
    expected = [(folder / name).read_bytes() for name in names]
    for again in (files, files[::-1], []):
        import_annotations(folder, again)
        assert [(folder / name).read_bytes() for name in names] == expected
    assert len(expected[0].splitlines()) == 1_000


def test_what_is_taken_back_after_an_import_is_gone(folder):
    (said,) = page_lines(opinions_of("ann", list(TASKS)[:1])[2:3])
    (folder / "ann.jsonl").write_text(json_lines([said]))
    import_annotations(folder, [folder / "ann.jsonl"])
    assert (folder / "annotated.jsonl").read_text()
    back = {key: said[key] for key in ("uid", "step", "annotator")}
    back |= {"at": "2027-01-01T00:00Z", "withdrawn": True}
    (folder / "ann.jsonl").write_text(json_lines([back]))
    import_annotations(folder, [folder / "ann.jsonl"])
    assert not (folder / "annotated.jsonl").read_text()
    assert json.loads((folder / "annotators.json").read_text())["pairs"] == 0


def test_a_pair_whose_label_alone_was_corrected_is_trained_on(folder):
    said = [o for o in opinions_of("ann", list(TASKS)[:3]) if o.step == "label"]
    (folder / "ann.jsonl").write_text(json_lines(page_lines(said)))
    import_annotations(folder, [folder / "ann.jsonl"])
    rows = [json.loads(line) for line in (folder / "annotated.jsonl").read_text().splitlines()]
    assert {row["uid"]: row["label"] for row in rows} == {o.uid: int(o.value) for o in said}


def test_bad_lines_are_set_aside_with_file_and_line_and_the_rest_is_used(folder, capsys):
    (good,) = page_lines(opinions_of("ann", list(TASKS)[:1])[2:3])
    (studio,) = label_studio_export(opinions_of("ann", list(TASKS)[:1]))
    (stepwise,) = stepwise_lines(opinions_of("ann", list(TASKS)[:1]))
    studio["annotations"][1]["result"][2]["from_name"] = "human_color"
    rows = [
        (good, ""),
        ("{", "not JSON"),
        ([1], "not an object"),
        ({"a": 1}, "keys a: expected a line"),
        (good | {"uid": "?"}, "uid '?' is not among the pairs"),
        (good | {"step": "color"}, "step 'color': no such step"),
        (good | {"value": "maybe"}, "category 'maybe': expected one of match, near, mismatch"),
        (good | {"value": None}, "nothing is said"),
        (good | {"annotator": " "}, "no annotator"),
        (good | {"at": "noon"}, "at='noon': expected a time"),
        (studio, "step 'color': no such step"),
        (studio | {"data": {}}, "uid None is not among"),
        (studio | {"annotations": 3}, "not a task of Label Studio's JSON export"),
        (stepwise | {"labels": [True]}, "1 labels for 5 completions"),
        (stepwise | {"labels": ["?"] * 5}, "label '?', expected true, false or null"),
    ]
    text = "".join(f"{row if row == '{' else json.dumps(row)}\n" for row, _ in rows)
    (folder / "mixed.jsonl").write_text(text)
    import_annotations(folder, [folder / "mixed.jsonl"])
    bad = [json.loads(line) for line in (folder / "bad_rows.jsonl").read_text().splitlines()]
    for line, (_, reason) in enumerate(rows, start=1):
        reasons = [row["reason"] for row in bad if row["line"] == line]
        assert bool(reasons) == bool(reason), (line, reasons)
        assert all(reason in given for given in reasons), (line, reasons)
    assert {row["file"] for row in bad} == {str(folder / "mixed.jsonl")}
    used = json.loads((folder / "annotators.json").read_text())
    assert used["opinions"] == 1 + 4  # the good line, and what else the task of Label Studio says
    assert used["without_annotation"] == list(TASKS)[1:]
    assert "99 pairs without annotation" in " ".join(capsys.readouterr().out.split())


def test_a_file_without_our_columns_is_known_by_its_prompt_and_its_name(tmp_path):
    said = opinions_of("carol", list(TASKS)[:3])
    columns = ("prompt", "completions", "labels")
    rows = [{name: row[name] for name in columns} for row in stepwise_lines(said)]
    (tmp_path / "carol.jsonl").write_text(json_lines(rows))
    back, bad = read_opinions([tmp_path / "carol.jsonl"], TASKS, SCHEMA)
    assert not bad
    assert [(o.uid, o.step, o.correct) for o in back] == [(o.uid, o.step, o.correct) for o in said]
    assert {o.annotator for o in back} == {"carol"}
    for opinion, true in zip(back, said, strict=True):  # wrong, and which is right is not said
        known = true.correct and STEPS[true.step].verdicts
        assert opinion.value == (true.value if known else "")


def test_the_majority_counts_a_tie_is_unknown_and_the_last_word_of_each_annotator():
    uid = next(iter(TASKS))
    words = {"ann": "near", "bob": "near", "eve": "match"}
    said = [
        Opinion(uid=uid, step="category", annotator=who, at=time_text("2026-12-01"), value=value)
        for who, value in words.items()
    ]
    assert consensus(by_pair(said)[uid], SCHEMA).truth == {"category": "near"}
    later = replace(said[0], at=time_text("2026-12-02"), value="match")
    assert consensus(by_pair([later, *said])[uid], SCHEMA).truth == {"category": "match"}
    tie = consensus(by_pair(said[1:])[uid], SCHEMA)
    assert (tie.truth, tie.ties) == ({}, ("category",))
    known = replace(TASKS[uid].example, steps={"category": "match"}, annotations=("category",))
    assert annotated_row(known, said[1:], SCHEMA)["steps"] == {"category": "match"}
    assert annotated_row(known, said, SCHEMA)["steps"] == {"category": "near"}


def test_the_agreement_of_the_annotators_is_that_of_krippendorff_on_pairs_with_several():
    said = (
        opinions_of("ann")
        + opinions_of("bob", list(TASKS)[:60])
        + opinions_of("eve", list(TASKS)[:20])
    )
    report = agreement(TASKS, said, SCHEMA)
    assert report["annotators"] == {"ann": 100, "bob": 60, "eve": 20}
    verdicts = STEPS["attributes"].verdicts
    table = {(o.annotator, o.uid): verdicts.index(o.value) for o in said if o.step == "attributes"}
    ratings = [
        [table.get((who, uid), float("nan")) for uid in TASKS] for who in report["annotators"]
    ]
    step = report["steps"]["attributes"]
    expected = krippendorff.alpha(reliability_data=ratings, level_of_measurement="ordinal")
    assert step["alpha"]["estimate"] == pytest.approx(expected)
    assert (step["pairs"], step["twice"]) == (100, 60)
    alone = agreement(TASKS, opinions_of("ann"), SCHEMA)["steps"]["attributes"]
    assert (alone["twice"], alone["alpha"], alone["ties"]) == (0, None, 0)
    right = [o.correct for o in opinions_of("ann") if o.step == "attributes"]
    assert alone["chain_right"] == pytest.approx(sum(right) / 100)


def test_trl_trains_on_the_pairs_whose_every_step_is_judged():
    uid = next(iter(TASKS))
    said = by_pair(opinions_of("ann", [uid]))[uid]
    correct = consensus(said, SCHEMA).correct
    row = judged_row(TASKS[uid], SCHEMA, correct)
    assert row["completions"] == [step.line for step in TASKS[uid].chain]
    assert row["labels"] == [o.correct for name in SCHEMA.names for o in said if o.step == name]
    del correct["query"]
    assert judged_row(TASKS[uid], SCHEMA, correct) is None


def test_an_import_of_nothing_and_into_no_folder_is_refused(folder, tmp_path_factory):
    (folder / "none.jsonl").write_text("{}\n")
    with pytest.raises(UserError, match="no annotation in"):
        import_annotations(folder, [folder / "none.jsonl"])
    assert not (folder / "imported.jsonl").exists()
    with pytest.raises(UserError, match=r"has no pairs\.jsonl: first she-jax annotate RUN"):
        import_annotations(tmp_path_factory.mktemp("empty"), [folder / "none.jsonl"])
    with pytest.raises(FileNotFoundError):
        import_annotations(folder, [folder / "missing.jsonl"])
