"use strict";
// Pictures: from a file to what the server says about its slices, and how that is shown.

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

// A picture for the next question: {url, layout, name, image, figure}. Throws where the server refuses it.
async function readPicture(file, remove) {
  const url = await readFile(file);
  const response = await fetch("page/slices", { method: "POST", headers: headers(), body: JSON.stringify({ image: url }) });
  if (!response.ok) throw new Error(await reason(response));
  const picture = { url, layout: await response.json(), name: file.name || "picture", image: await loadImage(url) };
  picture.figure = element("figure");
  const view = element("button", "view", seen(picture, 2 * devicePixelRatio));
  view.type = "button";
  view.title = "Look closer";
  view.setAttribute("aria-label", `${picture.name}: ${summary(picture.layout)}. Look closer`);
  view.onclick = () => look(picture);
  picture.figure.append(view, element("figcaption", "", summary(picture.layout)));
  const cross = button("close", "", () => remove(picture));
  cross.className = "remove";
  cross.setAttribute("aria-label", `Remove ${picture.name}`);
  picture.figure.append(cross);
  return picture;
}

function summary({ size, rows, cols, slices, visual_tokens }) {
  const split = rows * cols ? `overview + ${rows} × ${cols} slices` : slices === 1 ? "not split" : `${slices} slices`;
  return `${size[0]} × ${size[1]} px · ${split} · ${visual_tokens} tokens`;
}

// The overview with the cuts on it and, beside it, the slices apart. `sharp`: pixels drawn for one that is shown.
function seen({ image, layout }, sharp) {
  const { rows, cols } = layout;
  const [width, height] = [image.naturalWidth, image.naturalHeight];
  const shown = element("span", "seen");
  shown.style.setProperty("--aspect", width / height);
  shown.style.setProperty("--rows", rows);
  const draw = (x, y, w, h, most) => {
    const canvas = element("canvas");
    const scale = Math.min(1, (most * sharp) / Math.max(w, h));
    [canvas.width, canvas.height] = [w, h].map((side) => Math.max(1, Math.round(side * scale)));
    canvas.getContext("2d").drawImage(image, x, y, w, h, 0, 0, canvas.width, canvas.height);
    return canvas;
  };
  const whole = element("span", "overview");
  whole.append(draw(0, 0, width, height, 260));
  for (let n = 1; n < cols; n++) whole.append(cut("left", n / cols));
  for (let n = 1; n < rows; n++) whole.append(cut("top", n / rows));
  shown.append(whole);
  if (!(rows * cols)) return shown;
  const tiles = element("span", "tiles");
  tiles.style.gridTemplateColumns = `repeat(${cols}, auto)`;
  for (let n = 0; n < rows * cols; n++) {
    const [w, h] = [width / cols, height / rows];
    tiles.append(draw((n % cols) * w, Math.floor(n / cols) * h, w, h, 260 / Math.max(rows, cols)));
  }
  shown.append(tiles);
  return shown;
}

function cut(side, share) {
  const line = element("i", side);
  line.style[side] = `${share * 100}%`;
  return line;
}

function look(picture) {
  $("viewed").replaceChildren(seen(picture, 4), element("p", "faint", summary(picture.layout)));
  $("viewer").showModal();
}
