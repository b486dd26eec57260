// What the hand asks of Python: one wish under way at a time; newer changes of one gesture replace older ones that wait.

const MERGE_MS = 800; // keys pressed faster than this are one step of the history
const [LATE_MS, LOST_MS] = [1000, 5000]; // without an answer: until it is said, until the next wish is sent all the same
const WAITING = "waiting for Python…";

// part: the settings in the view, of which the hand has a copy of its own, ahead of Python's.
function connect(model, { restate, waiting, part = "state", isOnRelease = () => false }) {
  const client = Math.random().toString(36).slice(2, 8);
  const queue = [];
  let [pending, serial, timer, held, gesture] = ["", 0, 0, 0, 0];
  let [sent, isLate] = ["", false];
  let lastKey = { name: "", time: 0 };
  let unsent = null; // changes made while the hand holds a slider that updates on release
  const link = { client, local: structuredClone(model.get("view")[part]) };

  link.ask = (intent) => {
    const last = queue.at(-1);
    if (intent.gesture && last?.kind === intent.kind && last.gesture === intent.gesture) {
      for (const [name, value] of Object.entries(intent)) last[name] = value?.constructor === Object ? { ...last[name], ...value } : value;
    } else if (intent.kind === "select" && last?.kind === "select") last.item = intent.item;
    else queue.push(intent);
    pump();
  };

  function pump() {
    if (pending || !queue.length) return;
    const intent = queue.shift();
    sent = pending = intent.id = `${client}-${++serial}`;
    if (model.send) model.send(intent);
    else {
      model.set("intent", intent);
      model.save_changes();
    }
    timer = setTimeout(() => {
      isLate = true;
      waiting();
      timer = setTimeout(acknowledge, LOST_MS - LATE_MS);
    }, LATE_MS);
  }

  function acknowledge() {
    clearTimeout(timer);
    pending = "";
    pump();
  }

  link.heard = (view) => {
    if (view.ack === sent) isLate = false;
    if (view.ack === pending) acknowledge();
  };

  link.begin = (name) => {
    const now = Date.now();
    if (name === undefined || name !== lastKey.name || now - lastKey.time > MERGE_MS) gesture += 1;
    lastKey = { name, time: now };
  };

  link.gesture = () => `${client}-${gesture}`;

  link.change = (news) => {
    Object.assign(link.local, news.state);
    Object.assign(link.local.knobs, news.knobs);
    restate();
    if (held && isOnRelease()) unsent = { state: { ...unsent?.state, ...news.state }, knobs: { ...unsent?.knobs, ...news.knobs } };
    else link.ask({ kind: "set", state: { ...news.state }, knobs: { ...news.knobs }, gesture: link.gesture() });
  };

  link.hold = () => {
    held += 1;
    link.begin();
    const release = () => {
      removeEventListener("pointerup", release, true);
      removeEventListener("pointercancel", release, true);
      held -= 1;
      const news = unsent;
      unsent = null;
      if (news) link.change(news);
      link.settle();
    };
    addEventListener("pointerup", release, true);
    addEventListener("pointercancel", release, true);
  };

  link.isLate = () => isLate;
  link.isHeld = () => held > 0;
  link.isAhead = () => Boolean(held || pending || queue.length || unsent);

  // Python's settings are the hand's again, once nothing is under way.
  link.settle = () => {
    if (link.isAhead()) return false;
    link.local = structuredClone(model.get("view")[part]);
    restate(true);
    return true;
  };

  link.stop = () => clearTimeout(timer);
  return link;
}
