"use strict";
// The page's state: who annotates, the pair and step at hand, and by uid and step what was said.
const data = JSON.parse(document.getElementById("data").textContent);
const tasks = data.tasks, key = "she_jax/annotate/" + data.set;
const get = (id) => document.getElementById(id);
let state = {annotator: "", at: 0, step: 0, said: {}, undo: []};
try { state = {...state, ...JSON.parse(localStorage.getItem(key) || "{}")}; }
catch (error) { say("This browser keeps nothing: save before you leave."); }
state.at = Math.min(state.at, tasks.length - 1);

function say(text) { get("message").textContent = text; }

function keep() {
  try { localStorage.setItem(key, JSON.stringify(state)); }
  catch (error) { say("This browser keeps nothing: save before you leave."); }
}

function node(tag, text, kind) {
  const element = document.createElement(tag);
  if (text) element.textContent = text;
  if (kind) element.className = kind;
  return element;
}

const entryOf = (task, step) => (state.said[task.uid] || {})[step.name];
const saidOf = (task, step) => (entryOf(task, step) || {}).withdrawn ? undefined : entryOf(task, step);
const openSteps = (task) => task.steps.filter((step) => !saidOf(task, step)).length;

// What is said of a step, by whom and when; null takes it back, which is said, too: it may be imported already.
function set(task, step, said) {
  state.undo.push({at: state.at, step: state.step, name: step.name, before: entryOf(task, step) || null});
  state.undo = state.undo.slice(-500);
  put(task.uid, step.name, {...(said || {withdrawn: true}), annotator: state.annotator.trim(), at: new Date().toISOString()});
}

function put(uid, name, said) {
  const steps = state.said[uid] || (state.said[uid] = {});
  if (said) steps[name] = said; else delete steps[name];
  if (!Object.keys(steps).length) delete state.said[uid];
}

function choose(index) {
  const task = tasks[state.at], step = task.steps[state.step], choice = step.choices[index];
  if (!choice) return;
  const before = saidOf(task, step) || {};
  set(task, step, step.free ? {...before, correct: index === 0} : {value: choice[0]});
  if (state.step < task.steps.length - 1) state.step += 1;
  show();
}

function leaveOpen() {
  const task = tasks[state.at], step = task.steps[state.step];
  if (saidOf(task, step)) set(task, step, null);
  show();
}

function type(task, step, text) {
  const said = {...saidOf(task, step), value: text};
  if (!text) delete said.value;
  set(task, step, said.value || said.correct !== undefined ? said : null);
  count();  // the pair stays as it is: the click that ended the typing may be on one of its buttons
}

function undo() {
  const last = state.undo.pop();
  if (!last) return say("Nothing to undo.");
  state.at = last.at;
  state.step = last.step;
  put(tasks[last.at].uid, last.name, last.before);
  show();
}

function go(to) {
  if (to < 0 || to >= tasks.length) return say(to < 0 ? "This is the first pair." : "This is the last pair: save.");
  state.at = to;
  state.step = 0;
  show();
  window.scrollTo(0, 0);
}

function nextOpen() {
  for (let n = 1; n <= tasks.length; n++) {
    const to = (state.at + n) % tasks.length;
    if (openSteps(tasks[to])) return go(to);
  }
  say("Every step of every pair is annotated: save.");
}

function lines() {
  const rows = [];
  for (const task of tasks) for (const step of task.steps) {
    const said = entryOf(task, step);
    if (said) rows.push({uid: task.uid, step: step.name, ...said, annotator: said.annotator || state.annotator.trim()});
  }
  return rows;
}

function save() {
  const rows = lines();
  if (!state.annotator.trim()) { get("annotator").focus(); return say("Your name first: it stands in every line."); }
  if (!rows.length) return say("Nothing is annotated yet.");
  const text = rows.map((row) => JSON.stringify(row) + "\n").join("");
  const link = node("a");
  link.href = URL.createObjectURL(new Blob([text], {type: "application/x-ndjson"}));
  link.download = "annotated-by-" + state.annotator.trim().replace(/[^\p{L}\p{N}]+/gu, "-") + ".jsonl";
  link.click();
  say("Saved " + rows.length + " steps as " + link.download + ".");
}

function stepBox(task, step, index) {
  const said = saidOf(task, step);
  const box = node("section", "", "step" + (index === state.step ? " at" : "") + (said ? " said" : ""));
  const line = node("p");
  line.append(node("b", step.name), node("span", step.meaning ? " · " + step.meaning : "", "quiet"));
  const written = node("p"), text = node("bdi", step.text);
  written.append(text, node("b", step.verdict === null ? "" : (step.text ? " ⇒ " : "⇒ ") + step.verdict));
  if (!step.text && step.verdict === null) written.append(node("i", "not written", "quiet"));
  const choices = node("div", "", "choices");
  step.choices.forEach(([value, meaning], place) => {
    const button = node("button"), chosen = said && (step.free ? said.correct === (place === 0) : said.value === value);
    button.append(node("kbd", place < 9 ? String(place + 1) : ""), value, node("span", meaning ? " " + meaning : ""));
    if (value === step.verdict) button.className = "shown";
    button.setAttribute("aria-pressed", String(Boolean(chosen)));
    button.addEventListener("click", () => { state.step = index; choose(place); });
    choices.append(button);
  });
  box.append(line, written, choices);
  if (step.free) {
    const items = node("input", "", "items");
    items.placeholder = "the right items; like; these (optional)";
    items.setAttribute("aria-label", items.placeholder);
    items.value = said && said.value || "";
    items.addEventListener("change", () => type(task, step, items.value.trim()));
    items.addEventListener("focus", () => { state.step = index; });
    box.append(items);
  }
  return box;
}

function count() {
  keep();
  const done = tasks.filter((other) => !openSteps(other)).length;
  get("progress").value = tasks.length ? done / tasks.length : 0;
  get("count").textContent = "pair " + (state.at + 1) + " of " + tasks.length + " · " + done + " done";
  get("back").disabled = state.at === 0;
  get("next").disabled = state.at === tasks.length - 1;
  get("undo").disabled = !state.undo.length;
  say("");
}

function show() {
  count();
  const task = tasks[state.at], pair = get("pair");
  const query = node("h2"), fields = node("dl");
  query.append(node("bdi", task.query));
  for (const [name, text] of task.fields) {
    const value = node("dd");
    value.append(node("bdi", text));
    fields.append(node("dt", name), value);
  }
  const boxes = task.steps.map((step, index) => stepBox(task, step, index));
  pair.replaceChildren(query, fields, node("p", task.kind, "quiet"), ...boxes);
  boxes[state.step].scrollIntoView({block: "nearest"});
}

document.addEventListener("keydown", (event) => {
  if (event.ctrlKey || event.metaKey || event.altKey) return;
  if (event.target.tagName === "INPUT") { if (event.key === "Enter" || event.key === "Escape") event.target.blur(); return; }
  const last = tasks[state.at].steps.length - 1;
  const actions = {
    ArrowLeft: () => go(state.at - 1), ArrowRight: () => go(state.at + 1), Enter: () => go(state.at + 1),
    ArrowUp: () => { state.step = Math.max(0, state.step - 1); show(); },
    ArrowDown: () => { state.step = Math.min(last, state.step + 1); show(); },
    u: undo, s: save, n: nextOpen, 0: leaveOpen,
  };
  if (event.key === "Enter" && event.target.tagName === "BUTTON") return;
  if (/^[1-9]$/.test(event.key)) choose(Number(event.key) - 1);
  else if (actions[event.key]) actions[event.key]();
  else return;
  event.preventDefault();
});
get("annotator").value = state.annotator;
get("annotator").addEventListener("input", (event) => { state.annotator = event.target.value; keep(); });
for (const [id, act] of [["back", () => go(state.at - 1)], ["next", () => go(state.at + 1)], ["undo", undo], ["open", nextOpen],
  ["save", save]]) get(id).addEventListener("click", act);
show();
