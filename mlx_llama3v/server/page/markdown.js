"use strict";
// The part of Markdown that language models write, made of elements and never of HTML text. Pictures are not
// loaded and links lead away only on a click: an answer must not be able to call another site.

function markdown(text) {
  const made = document.createDocumentFragment();
  const lines = text.split("\n");
  const rule = [
    [/^```/, code],
    [/^#{1,6} /, (at) => [element(`h${Math.min(6, lines[at].indexOf(" ") + 2)}`, "", inline(lines[at].replace(/^#+ /, ""))), at + 1]],
    [/^\s*([-*+]|\d+[.)])\s/, list],
    [/^> ?/, quote],
    [/^\s*$/, (at) => [null, at + 1]],
  ];
  function code(at) {
    let end = at + 1;
    while (end < lines.length && !lines[end].startsWith("```")) end++;
    const block = element("pre");
    block.append(element("code", "", lines.slice(at + 1, end).join("\n")));
    return [block, end + 1];
  }
  function list(at) {
    const items = element(/^\s*\d/.test(lines[at]) ? "ol" : "ul");
    if (items.tagName === "OL") items.start = parseInt(lines[at], 10);
    for (; at < lines.length && rule[2][0].test(lines[at]); at++) {
      const item = element("li", "", inline(lines[at].replace(rule[2][0], "")));
      item.style.marginLeft = `${Math.floor(lines[at].search(/\S/) / 2)}em`;
      if (items.tagName === "OL" && !/^\s*\d/.test(lines[at])) item.className = "bullet"; // below a numbered one
      items.append(item);
    }
    return [items, at];
  }
  function quote(at) {
    const start = at;
    while (at < lines.length && lines[at].startsWith(">")) at++;
    const block = element("blockquote");
    block.append(markdown(lines.slice(start, at).map((line) => line.replace(/^> ?/, "")).join("\n")));
    return [block, at];
  }
  function paragraph(at) {
    const start = at++;
    while (at < lines.length && !rule.some(([begins]) => begins.test(lines[at]))) at++;
    return [element("p", "", inline(lines.slice(start, at).join("\n"))), at];
  }
  for (let at = 0; at < lines.length; ) {
    const make = rule.find(([begins]) => begins.test(lines[at]))?.[1] ?? paragraph;
    const [block, next] = make(at);
    if (block) made.append(block);
    at = next;
  }
  return made;
}

const INLINE = /`([^`\n]+)`|\*\*([^*]+)\*\*|\*([^*\s][^*\n]*)\*|(?<!!)\[([^\]\n]+)\]\((https?:\/\/[^\s)]+)\)/;

function inline(text) {
  const made = document.createDocumentFragment();
  for (let found; (found = INLINE.exec(text)); text = text.slice(found.index + found[0].length)) {
    made.append(text.slice(0, found.index));
    const [, code, strong, light, label, url] = found;
    if (url) {
      const link = element("a", "", label);
      [link.href, link.rel, link.target] = [url, "noreferrer noopener", "_blank"];
      link.title = url;
      made.append(link);
    } else {
      made.append(code ? element("code", "", code) : element(strong ? "strong" : "em", "", inline(strong ?? light)));
    }
  }
  made.append(text);
  return made;
}
