// Markdown to elements, as far as models write it: paragraphs, headings, lists, quotes, code,
// emphasis, links, tables. There is no way from text to markup here: no innerHTML, text nodes only.

import { element } from "./dom.js";

export function markdown(text) {
  const page = document.createDocumentFragment();
  const lines = text.split("\n");
  let at = 0;
  while (at < lines.length) {
    const rule = BLOCKS.find(([starts]) => starts(lines[at], lines[at + 1] ?? ""));
    const [block, next] = rule[1](lines, at);
    if (block) page.append(block);
    at = next;
  }
  return page;
}

const FENCE = /^ {0,3}(`{3,}|~{3,})\s*([\w+#.-]*)/;
const HEADING = /^(#{1,6})\s+(.*?)\s*#*$/;
const ITEM = /^(\s*)(?:[-*+]|(\d{1,9})[.)])\s+(.*)$/;
const QUOTE = /^ {0,3}> ?/;
const RULE = /^ {0,3}([-*_])(?:\s*\1){2,}\s*$/;
const TABLE = /^\s*\|?\s*:?-+:?\s*(\|\s*:?-+:?\s*)*\|?\s*$/;

// [does a block begin at this line, the block and the line behind it]
const BLOCKS = [
  [(line) => !line.trim(), (_, at) => [null, at + 1]],
  [(line) => FENCE.test(line), code],
  [(line) => HEADING.test(line), heading],
  [(line) => RULE.test(line), (_, at) => [element("hr"), at + 1]],
  [(line) => QUOTE.test(line), quote],
  [(line) => ITEM.test(line), list],
  [(line, next) => line.includes("|") && next.includes("|") && TABLE.test(next), table],
  [() => true, paragraph],
];
const begins = (line, next = "") => BLOCKS.slice(0, -1).some(([starts]) => starts(line, next));

function code(lines, at) {
  const [, fence, language] = FENCE.exec(lines[at]);
  let end = at + 1;
  while (end < lines.length && !lines[end].trim().startsWith(fence)) end += 1;
  const inside = element("code", {}, lines.slice(at + 1, end).join("\n"));
  const block = element("pre", { tabIndex: 0 }, inside);
  if (language) block.dataset.language = language;
  return [block, end + 1];
}

function heading(lines, at) {
  const [, marks, text] = HEADING.exec(lines[at]);
  return [element(`h${Math.min(marks.length + 2, 6)}`, {}, inline(text)), at + 1];
}

function quote(lines, at) {
  let end = at;
  while (end < lines.length && QUOTE.test(lines[end])) end += 1;
  const inside = lines.slice(at, end).map((line) => line.replace(QUOTE, ""));
  return [element("blockquote", {}, markdown(inside.join("\n"))), end];
}

function list(lines, at) {
  const [, indent, first] = ITEM.exec(lines[at]);
  const made = element(first === undefined ? "ul" : "ol");
  if (first !== undefined) made.start = Number(first);
  let end = at;
  while (end < lines.length) {
    const item = ITEM.exec(lines[end]);
    if (!item || item[1].length < indent.length) break;
    if (item[1].length > indent.length + 1 && made.lastChild) {
      const [inner, next] = list(lines, end);
      made.lastChild.append(inner);
      end = next;
      continue;
    }
    if ((item[2] === undefined) !== (first === undefined)) break;
    const entry = element("li", {}, inline(item[3]));
    made.append(entry);
    end += 1;
    while (end < lines.length && /^\s+\S/.test(lines[end]) && !ITEM.test(lines[end])) {
      entry.append("\n", inline(lines[end].trim()));
      end += 1;
    }
  }
  return [made, end];
}

function table(lines, at) {
  const cells = (line) => line.trim().replace(/^\||\|$/g, "").split("|").map((cell) => cell.trim());
  const row = (line, tag) => element("tr", {}, ...cells(line).map((cell) => element(tag, {}, inline(cell))));
  const body = element("tbody");
  let end = at + 2;
  while (end < lines.length && lines[end].includes("|")) {
    body.append(row(lines[end], "td"));
    end += 1;
  }
  const made = element("table", {}, element("thead", {}, row(lines[at], "th")), body);
  return [element("div", { className: "scroll" }, made), end];
}

function paragraph(lines, at) {
  let end = at + 1;
  while (end < lines.length && !begins(lines[end], lines[end + 1])) end += 1;
  const made = element("p");
  lines.slice(at, end).forEach((line, i) => {
    if (i) made.append(element("br"));
    made.append(inline(line.trim()));
  });
  return [made, end];
}

const SPAN =
  /(`+)(.+?)\1(?!`)|\*\*(\S(?:.*?\S)?)\*\*|\*(\S(?:.*?\S)?)\*|~~(\S(?:.*?\S)?)~~|\[([^\]]+)\]\((https?:\/\/[^\s)]+)\)|\\([\\`*_{}[\]()#+.!~|-])/;

function inline(text) {
  const made = document.createDocumentFragment();
  let rest = text;
  for (let found = SPAN.exec(rest); found; found = SPAN.exec(rest)) {
    const [whole, , source, strong, emphasis, struck, label, address, escaped] = found;
    made.append(rest.slice(0, found.index));
    if (source !== undefined) made.append(element("code", {}, source.replace(/^ (.+) $/, "$1")));
    else if (strong) made.append(element("strong", {}, inline(strong)));
    else if (emphasis) made.append(element("em", {}, inline(emphasis)));
    else if (struck) made.append(element("s", {}, inline(struck)));
    else if (label) made.append(link(label, address));
    else made.append(escaped);
    rest = rest.slice(found.index + whole.length);
  }
  made.append(rest);
  return made;
}

function link(label, address) {
  return element("a", { href: address, target: "_blank", rel: "noopener noreferrer" }, label);
}
