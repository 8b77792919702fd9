"use strict";
// One conversation with the server's own OpenAI-compatible API. Nothing is stored but the settings.
const $ = (id) => document.getElementById(id);
const KNOBS = ["system", "temperature", "top_p", "max_tokens", "seed", "theme"];
let model = null;
let turns = []; // {role, text, pictures, node, said, tools}
let waiting = []; // pictures for the next question: {url, canvas, layout, figure}
let running = null; // AbortController of the answer that streams

function headers() {
  const found = { "Content-Type": "application/json" };
  if ($("key").value) found.Authorization = `Bearer ${$("key").value}`;
  return found;
}

function fail(message) {
  $("error").textContent = message;
  $("error").hidden = !message;
}

async function reason(response) {
  try {
    return (await response.json()).error.message;
  } catch {
    return `The server answered ${response.status}.`;
  }
}

function element(tag, className, text) {
  const made = document.createElement(tag);
  if (className) made.className = className;
  if (text) made.textContent = text;
  return made;
}

function button(text, act) {
  const made = element("button", "", text);
  made.type = "button";
  made.onclick = act;
  return made;
}

// --- pictures

function readFile(file) {
  return new Promise((done, failed) => {
    const reader = new FileReader();
    reader.onload = () => done(reader.result);
    reader.onerror = () => failed(new Error(`${file.name} cannot be read.`));
    reader.readAsDataURL(file);
  });
}

function loadImage(url) {
  return new Promise((done, failed) => {
    const image = new Image();
    image.onload = () => done(image);
    image.onerror = () => failed(new Error("The browser cannot show this picture."));
    image.src = url;
  });
}

async function addFiles(files) {
  fail("");
  for (const file of files) {
    try {
      const url = await readFile(file);
      const response = await fetch("page/slices", { method: "POST", headers: headers(), body: JSON.stringify({ image: url }) });
      if (!response.ok) throw new Error(await reason(response));
      const layout = await response.json();
      const picture = { url, layout, name: file.name || "picture", figure: null };
      picture.figure = await drawn(picture, () => {
        waiting = waiting.filter((other) => other !== picture);
        picture.figure.remove();
        $("text").focus();
      });
      waiting.push(picture);
      $("waiting").append(picture.figure);
    } catch (error) {
      fail(error.message);
    }
  }
  $("text").focus();
}

// The picture with the cuts of its slices on it, and the slices beside each other as the model sees them.
async function drawn(picture, remove) {
  const { layout } = picture;
  const image = await loadImage(picture.url);
  const figure = element("figure");
  const scale = Math.min(1, 480 / image.naturalWidth, 360 / image.naturalHeight);
  const canvas = element("canvas");
  canvas.width = Math.max(1, Math.round(image.naturalWidth * scale));
  canvas.height = Math.max(1, Math.round(image.naturalHeight * scale));
  canvas.setAttribute("role", "img");
  canvas.setAttribute("aria-label", `${picture.name}, ${layout.slices} slices`);
  const pen = canvas.getContext("2d");
  pen.drawImage(image, 0, 0, canvas.width, canvas.height);
  pen.strokeStyle = "rgba(255, 60, 60, .9)";
  pen.lineWidth = 2;
  for (let col = 1; col < layout.cols; col++) pen.strokeRect((col * canvas.width) / layout.cols, -2, 0, canvas.height + 4);
  for (let row = 1; row < layout.rows; row++) pen.strokeRect(-2, (row * canvas.height) / layout.rows, canvas.width + 4, 0);
  figure.append(canvas);
  const split = layout.rows * layout.cols ? `overview + ${layout.rows} × ${layout.cols} slices` : "not split";
  figure.append(element("figcaption", "", `${layout.size[0]} × ${layout.size[1]}, ${split}, ${layout.visual_tokens} tokens`));
  if (layout.rows * layout.cols) figure.append(tiles(image, layout));
  if (remove) {
    const cross = button("×", remove);
    cross.className = "remove";
    cross.setAttribute("aria-label", `Remove ${picture.name}`);
    figure.append(cross);
  }
  return figure;
}

function tiles(image, layout) {
  const shown = element("div", "tiles");
  shown.style.gridTemplateColumns = `repeat(${layout.cols}, auto)`;
  const [width, height] = [image.naturalWidth / layout.cols, image.naturalHeight / layout.rows];
  const scale = 80 / Math.max(...layout.tile);
  for (let n = 0; n < layout.rows * layout.cols; n++) {
    const tile = element("canvas");
    [tile.width, tile.height] = layout.tile.map((side) => Math.max(1, Math.round(side * scale)));
    const [x, y] = [(n % layout.cols) * width, Math.floor(n / layout.cols) * height];
    tile.getContext("2d").drawImage(image, x, y, width, height, 0, 0, tile.width, tile.height);
    shown.append(tile);
  }
  return shown;
}

// --- the conversation

function show(turn) {
  $("hint").hidden = true;
  turn.node = element("article", `turn ${turn.role}`);
  turn.node.setAttribute("aria-label", turn.role === "user" ? "Question" : "Answer");
  if (turn.pictures.length) {
    const pictures = element("div", "pictures");
    for (const picture of turn.pictures) {
      picture.figure.querySelector(".remove")?.remove();
      pictures.append(picture.figure);
    }
    turn.node.append(pictures);
  }
  turn.said = element("div", "said", turn.text);
  turn.tools = element("div", "tools");
  turn.node.append(turn.said, turn.tools);
  $("log").append(turn.node);
  $("log").scrollTop = $("log").scrollHeight;
}

function addTools(turn, note) {
  turn.tools.replaceChildren(
    button("Copy", async (event) => {
      await navigator.clipboard.writeText(turn.text);
      event.target.textContent = "Copied";
    }),
    button("Retry", retry),
    element("span", "note", note),
  );
  // Only the last answer can be had again.
  document.querySelectorAll(".turn.assistant").forEach((node) => {
    const again = [...node.querySelectorAll(".tools button")].find((made) => made.textContent === "Retry");
    if (again) again.hidden = node !== turn.node;
  });
}

function messages() {
  const found = turns.map(({ role, text, pictures }) => ({
    role,
    content: pictures.length
      ? [...pictures.map(({ url }) => ({ type: "image_url", image_url: { url } })), { type: "text", text }]
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

async function answer() {
  fail("");
  running = new AbortController();
  busy(true);
  const sent = body();
  const turn = { role: "assistant", text: "", pictures: [] };
  let ended = "";
  let usage = null;
  show(turn);
  try {
    const response = await fetch("v1/chat/completions", { method: "POST", headers: headers(), body: sent, signal: running.signal });
    if (!response.ok) throw new Error(await reason(response));
    for await (const event of events(response)) {
      if (event.error) throw new Error(event.error.message);
      usage = event.usage ?? usage;
      ended = event.llama3v?.finish_reason ?? ended;
      const near = $("log").scrollHeight - $("log").scrollTop - $("log").clientHeight < 80;
      turn.text += event.choices[0]?.delta.content ?? "";
      turn.said.textContent = turn.text;
      if (near) $("log").scrollTop = $("log").scrollHeight;
    }
  } catch (error) {
    if (error.name === "AbortError") ended = "stopped";
    else {
      fail(error instanceof TypeError ? "The server cannot be reached." : error.message);
      ended = "failed";
    }
  }
  running = null;
  busy(false);
  if (!turn.text && (ended === "failed" || ended === "stopped")) {
    turn.node.remove(); // the question stays, to be sent again
    undo();
    return;
  }
  turns.push(turn);
  const notes = { length: "cut off: too long", repetition: "ended: it repeated itself", stopped: "stopped", failed: "broke off" };
  const counts = usage ? `${usage.completion_tokens} ${usage.completion_tokens === 1 ? "token" : "tokens"}` : "";
  addTools(turn, [counts, notes[ended]].filter(Boolean).join(", "));
}

// The last question goes back into the form.
function undo() {
  const asked = turns.pop();
  asked.node.remove();
  $("text").value = asked.text;
  waiting = [...asked.pictures, ...waiting];
  for (const picture of asked.pictures) $("waiting").append(picture.figure);
  $("hint").hidden = turns.length > 0;
  grow();
}

function busy(yes) {
  $("send").hidden = yes;
  $("stop").hidden = !yes;
  $("log").setAttribute("aria-busy", yes);
  (yes ? $("stop") : $("text")).focus();
}

function ask() {
  const text = $("text").value.trim();
  if (running || (!text && !waiting.length)) return;
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
  running?.abort();
  for (const turn of turns) turn.node.remove();
  turns = [];
  waiting.forEach((picture) => picture.figure.remove());
  waiting = [];
  $("hint").hidden = false;
  fail("");
  $("text").focus();
}

// --- the form

function grow() {
  $("text").style.height = "auto";
  $("text").style.height = `${$("text").scrollHeight + 2}px`;
}

function keep() {
  document.documentElement.dataset.theme = $("theme").value;
  localStorage.setItem("llama3v", JSON.stringify(Object.fromEntries(KNOBS.map((id) => [id, $(id).value]))));
}

async function greet() {
  const response = await fetch("v1/models", { headers: headers() });
  if (!response.ok) {
    fail(await reason(response));
    return;
  }
  fail("");
  model = (await response.json()).data[0].id;
  $("model").textContent = document.title = model;
}

$("form").onsubmit = (event) => { event.preventDefault(); ask(); };
$("text").oninput = grow;
$("text").onkeydown = (event) => {
  if (event.key === "Enter" && !event.shiftKey && !event.isComposing) { event.preventDefault(); ask(); }
};
$("stop").onclick = () => running?.abort();
$("new").onclick = restart;
$("file").onchange = async (event) => { await addFiles(event.target.files); event.target.value = ""; };
$("open-settings").onclick = () => $("settings").showModal();
$("settings").onclose = () => { keep(); greet().catch(() => fail("The server cannot be reached.")); };
$("theme").onchange = keep;
document.onkeydown = (event) => { if (event.key === "Escape" && running) running.abort(); };
document.onpaste = (event) => {
  const files = [...event.clipboardData.files].filter((file) => file.type.startsWith("image/"));
  if (files.length) { event.preventDefault(); addFiles(files); }
};
document.ondragover = (event) => { event.preventDefault(); $("drop").hidden = false; };
document.ondragleave = (event) => { if (!event.relatedTarget) $("drop").hidden = true; };
document.ondrop = (event) => { event.preventDefault(); $("drop").hidden = true; addFiles(event.dataTransfer.files); };

const kept = JSON.parse(localStorage.getItem("llama3v") ?? "{}");
for (const id of KNOBS) if (id in kept) $(id).value = kept[id];
document.documentElement.dataset.theme = $("theme").value;
greet().catch(() => fail("The server cannot be reached."));
