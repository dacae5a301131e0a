// The settings dialog, and what of it goes into a request. An empty field is not sent.

import { element, find } from "./dom.js";
import { store } from "./store.js";
import { t } from "./words.js";

const NUMBERS = {
  temperature: { min: 0, max: 2, step: 0.1 },
  top_p: { min: 0.01, max: 1, step: 0.01 },
  top_k: { min: 0, step: 1 },
  min_p: { min: 0, max: 1, step: 0.01 },
  repetition_penalty: { min: 0.1, max: 10, step: 0.05 },
  max_tokens: { min: 1, step: 1 },
  seed: { min: 0, step: 1 },
};
const UNSET = { max_tokens: "as_server", seed: "as_chance" }; // what an empty field says

export function show(model) {
  find("numbers").replaceChildren(
    ...Object.entries(NUMBERS).map(([name, limits]) => {
      const input = element("input", { type: "number", id: `set-${name}`, ...limits });
      input.value = store.settings[name] ?? "";
      input.placeholder = t(UNSET[name] ?? "as_model");
      input.addEventListener("change", () => store.set(name, input.value));
      return element("label", { className: "block" }, element("span", {}, t(name)), input);
    }),
  );
  find("system").value = store.settings.system ?? "";
  find("stop-strings").value = store.settings.stop ?? "";
  find("api-key").value = store.key;
  find("template").textContent = model?.quantkit.chat_template ?? t("no_template");
}

export function install(changedKey) {
  find("system").addEventListener("change", (e) => store.set("system", e.target.value));
  find("stop-strings").addEventListener("change", (e) => store.set("stop", e.target.value));
  find("api-key").addEventListener("change", (e) => {
    store.key = e.target.value;
    changedKey();
  });
  find("reset").addEventListener("click", () => {
    for (const name of [...Object.keys(NUMBERS), "system", "stop"]) store.set(name, "");
    for (const input of find("settings").querySelectorAll("input:not([type=password]), textarea")) {
      input.value = "";
    }
  });
}

export const system = () => (store.settings.system ?? "").trim();

export function request() {
  const found = {};
  for (const name of Object.keys(NUMBERS)) {
    const value = parseFloat(store.settings[name]);
    if (Number.isFinite(value)) found[name] = value;
  }
  const stop = (store.settings.stop ?? "").split("\n").filter(Boolean);
  if (stop.length) found.stop = stop;
  return found;
}
