"use strict";
// One conversation with the server's own OpenAI-compatible API. Nothing is stored but the settings.
const $ = (id) => document.getElementById(id);
const KNOBS = ["system", "temperature", "top_p", "max_tokens", "seed", "theme"];
let model = null;
let turns = []; // {role, text, pictures, node, said, tools}
let waiting = []; // pictures for the next question, see pictures.js
let reading = 0; // pictures on their way into `waiting`
let running = null; // AbortController of the answer that streams

function headers() {
  const found = { "Content-Type": "application/json" };
  if ($("key").value) found.Authorization = `Bearer ${$("key").value}`;
  return found;
}

function fail(message) {
  $("error").textContent = message.replace(/^[a-z](?=[a-z]* )/, (letter) => letter.toUpperCase()); // not a field's name
  $("error").hidden = !message;
}

async function reason(response) {
  try {
    const message = (await response.json()).error.message;
    return response.status === 401 ? `${message} Enter it in the settings.` : message;
  } catch {
    return `The server answered ${response.status}.`;
  }
}

function element(tag, className = "", content = "") {
  const made = document.createElement(tag);
  if (className) made.className = className;
  made.append(content);
  return made;
}

function button(icon, text, act) {
  const made = element("button");
  const svg = document.createElementNS("http://www.w3.org/2000/svg", "svg");
  const use = document.createElementNS("http://www.w3.org/2000/svg", "use");
  use.setAttribute("href", `#i-${icon}`);
  svg.append(use);
  made.append(svg, text);
  made.type = "button";
  made.onclick = act;
  return made;
}

// --- pictures for the next question

async function addFiles(files) {
  fail("");
  for (const file of files) {
    reading++;
    $("composer").classList.add("reading");
    try {
      const picture = await readPicture(file, (gone) => {
        waiting = waiting.filter((other) => other !== gone);
        gone.figure.remove();
        focusText();
      });
      waiting.push(picture);
      $("waiting").append(picture.figure);
    } catch (error) {
      fail(error instanceof TypeError ? "The server cannot be reached." : error.message);
    }
    $("composer").classList.toggle("reading", --reading > 0);
  }
  focusText();
}

// --- the conversation

function show(turn) {
  $("hint").hidden = true;
  turn.node = element("article", `turn ${turn.role}`);
  turn.node.setAttribute("aria-label", turn.role === "user" ? "Question" : "Answer");
  if (turn.pictures.length) {
    const pictures = element("div", "pictures");
    pictures.append(...turn.pictures.map(({ figure }) => figure));
    turn.node.append(pictures);
  }
  turn.said = element("div", "said", turn.text);
  turn.tools = element("div", "tools");
  turn.node.append(turn.said, turn.tools);
  $("log").append(turn.node);
  $("log").scrollTop = $("log").scrollHeight;
  offer();
}

// Only the last question can be edited, and only the last answer be had again.
function offer() {
  document.querySelectorAll(".turn .last").forEach((made) => made.remove());
  if (running) return;
  const [asked, answered] = turns.slice(-2);
  if (asked?.role === "user" && answered) {
    asked.tools.append(last("edit", "Edit", edit));
    answered.tools.querySelector("button").after(last("retry", "Retry", retry));
  }
}

function last(icon, text, act) {
  const made = button(icon, text, act);
  made.className = "last";
  return made;
}

function addTools(turn, note) {
  const copy = button("copy", "Copy", async () => {
    await navigator.clipboard.writeText(turn.text);
    copy.lastChild.textContent = "Copied";
    setTimeout(() => (copy.lastChild.textContent = "Copy"), 1500);
  });
  turn.tools.replaceChildren(copy, element("span", "note", note));
}

function messages() {
  const found = turns.map(({ role, text, pictures }) => ({
    role,
    content: pictures.length
      ? [...pictures.map(({ url }) => ({ type: "image_url", image_url: { url } })), ...(text ? [{ type: "text", text }] : [])]
      : text,
  }));
  const system = $("system").value.trim();
  return system ? [{ role: "system", content: system }, ...found] : found;
}

function body() {
  const number = (id) => ($(id).value === "" ? null : Number($(id).value));
  return JSON.stringify({
    model,
    messages: messages(),
    stream: true,
    stream_options: { include_usage: true },
    max_tokens: number("max_tokens"),
    temperature: number("temperature"),
    top_p: number("top_p"),
    seed: number("seed"),
  });
}

async function* events(response) {
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  for (;;) {
    const { value, done } = await reader.read();
    if (done) return;
    const lines = (rest + value).split("\n");
    rest = lines.pop();
    for (const line of lines) if (line.startsWith("data: ") && line !== "data: [DONE]") yield JSON.parse(line.slice(6));
  }
}

// Writes the answer's text at most once a frame.
function writer(turn) {
  let asked = false;
  const write = () => {
    asked = false;
    const near = $("log").scrollHeight - $("log").scrollTop - $("log").clientHeight < 80;
    turn.said.replaceChildren(markdown(turn.text));
    if (near) $("log").scrollTop = $("log").scrollHeight;
  };
  return { write, soon: () => { if (!asked) requestAnimationFrame(write); asked = true; } };
}

async function answer() {
  fail("");
  running = new AbortController();
  busy(true);
  const sent = body();
  const turn = { role: "assistant", text: "", pictures: [] };
  let ended = "failed"; // unless the server says how
  let usage = null;
  let times = null;
  show(turn);
  const page = writer(turn);
  try {
    const response = await fetch("v1/chat/completions", { method: "POST", headers: headers(), body: sent, signal: running.signal });
    if (!response.ok) throw new Error(await reason(response));
    for await (const event of events(response)) {
      if (event.error) throw new Error(event.error.message);
      usage = event.usage ?? usage;
      times = event.llama3v?.timings ?? times;
      ended = event.llama3v?.finish_reason ?? ended;
      turn.text += event.choices[0]?.delta.content ?? "";
      page.soon();
    }
    if (ended === "failed") fail("The connection broke off.");
  } catch (error) {
    if (error.name === "AbortError") ended = "stopped";
    else fail(error instanceof TypeError ? "The server cannot be reached." : error.message);
  }
  running = null;
  busy(false);
  if (!turns.length) return; // a new chat was begun meanwhile
  if (!turn.text && (ended === "failed" || ended === "stopped")) {
    turn.node.remove(); // the question stays, to be sent again
    edit();
    return;
  }
  page.write();
  turns.push(turn);
  addTools(turn, note(ended, usage, times));
  offer();
}

function note(ended, usage, times) {
  const notes = { length: "cut off: too long", repetition: "ended: it repeated itself", stopped: "stopped", failed: "broke off" };
  const said = usage?.completion_tokens;
  const parts = [notes[ended]];
  if (said) parts.push(`${said} ${said === 1 ? "token" : "tokens"}`);
  if (said > 1 && times?.decode) parts.push(`${((said - 1) / times.decode).toFixed(1)}/s`);
  if (times) parts.push(`first after ${times.first_token.toFixed(2)} s`);
  return parts.filter(Boolean).join(" · ");
}

// The last question goes back into the form, its answer away.
function edit() {
  if (turns.at(-1)?.role === "assistant") turns.pop().node.remove();
  const asked = turns.pop();
  asked.node.remove();
  $("text").value = asked.text;
  waiting = [...asked.pictures, ...waiting];
  $("waiting").prepend(...asked.pictures.map(({ figure }) => figure));
  $("hint").hidden = turns.length > 0;
  grow();
  focusText();
  offer();
}

function busy(yes) {
  $("send").hidden = yes;
  $("stop").hidden = !yes;
  $("log").setAttribute("aria-busy", yes);
  if (yes) $("stop").focus();
  else focusText();
}

// Not on a phone, where the keyboard would cover the answer.
function focusText() {
  if (matchMedia("(pointer: fine)").matches) $("text").focus();
}

function ask() {
  const text = $("text").value.trim();
  if (running || reading || (!text && !waiting.length)) return;
  const turn = { role: "user", text, pictures: waiting };
  waiting = [];
  $("text").value = "";
  grow();
  turns.push(turn);
  show(turn);
  answer();
}

function retry() {
  if (running) return;
  turns.pop().node.remove();
  answer();
}

function restart() {
  for (const { node } of turns) node.remove();
  document.querySelectorAll(".turn").forEach((node) => node.remove()); // also the answer that streams
  turns = [];
  running?.abort();
  waiting.forEach(({ figure }) => figure.remove());
  waiting = [];
  $("hint").hidden = false;
  fail("");
  focusText();
}

// --- the form

function grow() {
  $("text").style.height = "auto";
  $("text").style.height = `${$("text").scrollHeight}px`;
}

function keep() {
  document.documentElement.dataset.theme = $("theme").value;
  localStorage.setItem("llama3v", JSON.stringify(Object.fromEntries(KNOBS.map((id) => [id, $(id).value]))));
}

async function greet() {
  const response = await fetch("v1/models", { headers: headers() });
  if (!response.ok) return fail(await reason(response));
  fail("");
  model = (await response.json()).data[0].id;
  $("model").textContent = document.title = model;
}

const unreachable = () => fail("The server cannot be reached.");
$("form").onsubmit = (event) => { event.preventDefault(); ask(); };
$("text").oninput = grow;
$("text").onkeydown = (event) => {
  if (event.key === "Enter" && !event.shiftKey && !event.isComposing) { event.preventDefault(); ask(); }
};
$("stop").onclick = () => running?.abort();
$("new").onclick = restart;
$("file").onchange = async (event) => { await addFiles([...event.target.files]); event.target.value = ""; };
$("open-settings").onclick = () => $("settings").showModal();
$("settings").onclose = () => { keep(); greet().catch(unreachable); };
$("theme").onchange = keep;
$("viewer").onclick = (event) => { if (event.target === $("viewer")) $("viewer").close(); };
document.onkeydown = (event) => { if (event.key === "Escape" && running && !document.querySelector("dialog[open]")) running.abort(); };
document.onpaste = (event) => {
  const files = [...event.clipboardData.files].filter((file) => file.type.startsWith("image/"));
  if (files.length) { event.preventDefault(); addFiles(files); }
};
document.ondragover = (event) => { event.preventDefault(); $("drop").hidden = false; };
document.ondragleave = (event) => { if (!event.relatedTarget) $("drop").hidden = true; };
document.ondrop = (event) => { event.preventDefault(); $("drop").hidden = true; addFiles([...event.dataTransfer.files]); };

const kept = JSON.parse(localStorage.getItem("llama3v") ?? "{}");
for (const id of KNOBS) if (id in kept) $(id).value = kept[id];
document.documentElement.dataset.theme = $("theme").value;
const local = /^(localhost|127\.|\[::1\])/.test(location.hostname);
$("where").textContent = local ? "Nothing leaves this machine." : `Pictures go to ${location.hostname} and nowhere else.`;
greet().catch(unreachable);
