// Elements without markup: text that comes from a model or a user only ever becomes a text node.

export const find = (id) => document.getElementById(id);

export function element(tag, properties = {}, ...children) {
  const made = document.createElement(tag);
  for (const [name, value] of Object.entries(properties)) {
    if (name in made) made[name] = value;
    else made.setAttribute(name, value);
  }
  made.append(...children);
  return made;
}

// Calls `draw` at most once a frame, with the newest arguments: streams come faster than screens.
export function eachFrame(draw) {
  let waiting = null;
  return (...args) => {
    if (waiting === null) {
      requestAnimationFrame(() => {
        const newest = waiting;
        waiting = null;
        if (newest) draw(...newest);
      });
    }
    waiting = args;
  };
}
