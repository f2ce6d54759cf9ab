// What this browser remembers beside pictures; nothing, where it is told not to.

const storage = (tab) => (tab ? sessionStorage : localStorage);

/** A value that was kept, for this tab or for all; null where there is none, or none that can be read. */
export function recall(name, { tab = false } = {}) {
  try {
    return JSON.parse(storage(tab).getItem(name));
  } catch {
    return null;
  }
}

/** Keeps a value, or forgets it where it is null. */
export function remember(name, value, { tab = false } = {}) {
  try {
    if (value === null) storage(tab).removeItem(name);
    else storage(tab).setItem(name, JSON.stringify(value));
  } catch { /* the page works without */ }
}
