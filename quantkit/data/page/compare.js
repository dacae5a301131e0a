// The same prompt to two or three models at once, and where their answers differ.

import { bubble, figures, receive, trouble } from "./answer.js";
import { difference } from "./diff.js";
import { element, find } from "./dom.js";
import * as settings from "./settings.js";
import { store } from "./store.js";
import { number, t } from "./words.js";

const MOST = 3;
const SEED = 1; // where none is set: differences shall come from the models

export class Compare {
  constructor() {
    this.models = [];
    this.answers = []; // {model, text, stats}, the first one is what the others are held against
    this.prompt = "";
  }

  offer(models) {
    const before = new Set(store.settings.compared ?? []);
    const known = models.filter((model) => before.has(model.id));
    this.models = (known.length > 1 ? known : models).slice(0, MOST);
    const boxes = models.map((model) => {
      const box = element("input", { type: "checkbox", value: model.id });
      box.checked = this.models.includes(model);
      box.addEventListener("change", () => this.choose(models));
      return element("label", { className: "chip" }, box, model.id);
    });
    find("chosen").replaceChildren(find("chosen").firstElementChild, ...boxes);
    find("chosen").hidden = models.length < 2;
    this.draw();
  }

  choose(models) {
    const boxes = [...find("chosen").querySelectorAll("input")];
    this.models = models.filter((_, i) => boxes[i].checked);
    for (const box of boxes) box.disabled = !box.checked && this.models.length >= MOST;
    store.set("compared", this.models.map((model) => model.id));
  }

  draw() {
    const columns = find("columns");
    columns.replaceChildren(...(this.answers.length ? this.results() : [this.greeting()]));
  }

  greeting() {
    const enough = find("chosen").querySelectorAll("input").length > 1;
    return element(
      "div",
      { className: "greeting" },
      element("h1", {}, t("compare_title")),
      element("p", { className: "faint" }, t(enough ? "compare_text" : "compare_one")),
    );
  }

  results() {
    const asked = bubble("user", t("you"));
    asked.body.textContent = this.prompt;
    const row = element("div", { className: "columns" }, ...this.answers.map((one, i) => this.column(one, i)));
    return [asked.box, row];
  }

  column(one, index) {
    const { box, head, body, foot } = bubble("assistant", one.model.id);
    const [reference] = this.answers;
    if (index === 0) head.append(" ", element("span", { className: "tag" }, t("reference")));
    if (index === 0 || !one.done || !reference.done) {
      body.textContent = one.text;
    } else {
      const found = difference(reference.text, one.text);
      body.append(...found.parts.map((part) => (part.same ? part.text : element("mark", {}, part.text))));
      head.append(" ", element("span", { className: found.at === null ? "tag good" : "tag" }, told(found)));
    }
    foot.append(figures(one.stats));
    if (!one.done) box.classList.add("writing");
    return box;
  }

  async ask(text, signal) {
    if (this.models.length < 2) {
      trouble(new Error(t("compare_few")));
      return;
    }
    this.prompt = text;
    this.answers = this.models.map((model) => ({ model, text: "", done: false }));
    const system = settings.system();
    const messages = [...(system ? [{ role: "system", content: system }] : []), { role: "user", content: text }];
    this.draw();
    await Promise.all(this.answers.map((one) => this.fill(one, messages, signal)));
    document.querySelector("main").scrollTop = 0;
  }

  async fill(one, messages, signal) {
    const draw = (text) => {
      one.text = text;
      this.draw();
    };
    try {
      const asked = { seed: SEED, ...settings.request() };
      Object.assign(one, await receive(one.model, messages, asked, signal, draw));
      one.done = true;
    } catch (error) {
      trouble(error);
    }
    this.draw();
  }
}

function told({ at, share }) {
  if (at === null) return t("same");
  const percent = share.toLocaleString(undefined, { style: "percent" });
  return t(at ? "differs" : "differs_at_once", { at: number(at), share: percent });
}
