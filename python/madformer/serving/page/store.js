// What was drawn, kept in this browser (IndexedDB); in memory alone where the browser keeps nothing.

const NAME = "madformer", STORE = "drawings", MOST = 200;
const memory = new Map();
let opening;

const done = (request) => new Promise((resolve, reject) => {
  request.onsuccess = () => resolve(request.result);
  request.onerror = () => reject(request.error);
});

function database() {
  opening ??= (async () => {
    const request = indexedDB.open(NAME, 1);
    request.onupgradeneeded = () => request.result.createObjectStore(STORE, { keyPath: "key", autoIncrement: true });
    return done(request);
  })().catch(() => null);
  return opening;
}

async function run(mode, work) {
  const open = await database();
  if (!open) return null;
  const transaction = open.transaction(STORE, mode);
  const result = await work(transaction.objectStore(STORE));
  await new Promise((resolve, reject) => {
    transaction.oncomplete = resolve;
    transaction.onabort = transaction.onerror = () => reject(transaction.error);
  });
  return result;
}

/** All that is kept, the newest first. */
export async function all() {
  const entries = (await run("readonly", (store) => done(store.getAll()))) ?? [...memory.values()];
  return entries.reverse();
}

/** Keeps an entry, { time, model, request, pictures: [{ seed, format, blob }] }, and gives it with its key. */
export async function keep(entry) {
  for (let left = 3; ; left -= 1) {
    try {
      const key = await run("readwrite", (store) => done(store.put(entry)));
      if (key === null) {
        entry.key ??= memory.size ? Math.max(...memory.keys()) + 1 : 1;
        memory.set(entry.key, entry);
        return entry;
      }
      entry.key = key;
      await prune(MOST);
      return entry;
    } catch (error) {
      if (error?.name !== "QuotaExceededError" || left === 0) throw error;
      await prune(Math.floor((await all()).length / 2));
    }
  }
}

async function prune(most) {
  await run("readwrite", async (store) => {
    const keys = await done(store.getAllKeys());
    keys.slice(0, Math.max(0, keys.length - most)).forEach((key) => store.delete(key));
  });
}

export async function forget(key) {
  memory.delete(key);
  await run("readwrite", (store) => done(store.delete(key)));
}

export async function clear() {
  memory.clear();
  await run("readwrite", (store) => done(store.clear()));
}
