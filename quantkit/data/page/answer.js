// One answer on the screen: its text as it comes, and the figures below.

import { answer } from "./api.js";
import { eachFrame, element, find } from "./dom.js";
import { markdown } from "./markdown.js";
import { number, t } from "./words.js";

export function bubble(kind, name) {
  const body = element("div", { className: "body" });
  const foot = element("footer", { className: "faint" });
  const head = element("header", {}, name);
  const box = element("article", { className: kind }, head, body, foot);
  return { box, head, body, foot };
}

// Ask, and draw with `draw(text)` as it comes. Ends with {text, stats}; stopping is no error.
export async function receive(model, messages, settings, signal, draw) {
  const begun = performance.now();
  let [text, first, end] = ["", null, null];
  const soon = eachFrame(draw);
  try {
    for await (const piece of answer(model, messages, settings, signal)) {
      if (piece.text) {
        first ??= performance.now();
        text += piece.text;
        soon(text);
      }
      if (piece.usage) end = piece;
    }
  } catch (error) {
    if (error.name !== "AbortError") throw error;
  }
  draw(text);
  const now = performance.now();
  const count = end?.usage.completion_tokens ?? null;
  const writing = first === null ? 0 : (now - first) / 1000;
  const stats = {
    tokens: count,
    // the first token is there when the clock starts
    rate: count > 1 && writing > 0 ? (count - 1) / writing : null,
    first: first === null ? null : (first - begun) / 1000,
    finish: signal.aborted ? "stopped" : end?.finish,
  };
  return { text, stats };
}

export function figures(stats) {
  const said = [];
  if (stats?.tokens != null) said.push(t("tokens", { count: number(stats.tokens) }));
  if (stats?.rate) said.push(t("rate", { rate: number(stats.rate, stats.rate < 10 ? 1 : 0) }));
  if (stats?.first != null) said.push(t("first", { seconds: number(stats.first, 2) }));
  if (stats?.finish === "length") said.push(t("cut"));
  if (stats?.finish === "stopped") said.push(t("stopped"));
  return said.join(" · ");
}

export function written(body, text) {
  body.replaceChildren(markdown(text));
}

export function trouble(error) {
  const box = find("trouble");
  const reason = error instanceof TypeError ? t("unreachable") : error.message;
  box.textContent = t("failed", { reason });
  box.hidden = false;
}

export const untroubled = () => {
  find("trouble").hidden = true;
};

export const button = (key, act) =>
  element("button", { type: "button", className: "small", onclick: act }, t(key));
