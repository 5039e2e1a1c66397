// Keeps the page current from /visitas/stream, without a reload. It writes numbers, times and
// paths, and chooses among the texts of templates/page.html; it has no text of its own. The charts
// are drawn as in src/routes/page/chart.rs.

const main = document.querySelector("main");
const at = (id) => document.getElementById(id);

// The texts

// What was not true as the page was sent waits in an attribute, out of sight of text browsers.
for (const element of document.querySelectorAll("[data-html]")) {
  element.innerHTML = element.dataset.html;
  delete element.dataset.html;
}

// Shows the forms of texts that are true now: what `holds` in src/routes/page/present.rs says for the
// page as it is sent.
function showForms() {
  const { visit, live, difference, rates, failures, back = "" } = main.dataset;
  const [postgres, redis] = [main.dataset.postgres === "ok", main.dataset.redis === "ok"];
  const isBack = (store) => back.split(" ").includes(store);
  const [isPostgresBack, isRedisBack] = [postgres && isBack("postgres"), redis && isBack("redis")];
  const isRefused = visit === "failed" || visit === "doubt";
  const forms = {
    "postgres-up": postgres,
    "postgres-down": !postgres,
    "postgres-down-alone": !postgres && redis,
    "postgres-down-live": !postgres && live === "on",
    "both-down": !postgres && !redis,
    "postgres-news": !postgres || isRefused || isPostgresBack,
    "postgres-fine": postgres && isRefused && !isPostgresBack,
    "postgres-back": isPostgresBack,
    "visit-again": postgres && (isRefused || isPostgresBack),
    "redis-up": redis,
    "redis-down": !redis,
    "redis-news": postgres && (!redis || isRedisBack),
    "redis-down-alone": postgres && !redis,
    "redis-back": postgres && isRedisBack,
    same: difference === "same",
    behind: difference === "behind",
    ahead: difference === "ahead",
    still: live === "no",
    live: live === "on",
    stale: live === "stale",
    slider: live !== "no",
    "no-rates": rates === "none",
    failures: failures === "some",
  };
  for (const element of document.querySelectorAll("[data-if]"))
    element.hidden = !forms[element.dataset.if];
}

// How numbers and times are written

const language = document.documentElement.lang;
const whole = new Intl.NumberFormat(language, { maximumFractionDigits: 0 });
const upToTenths = new Intl.NumberFormat(language, { maximumFractionDigits: 1 });
const tenths = new Intl.NumberFormat(language, {
  minimumFractionDigits: 1,
  maximumFractionDigits: 1,
});
const minutes = { hour: "2-digit", minute: "2-digit", hourCycle: "h23" };

const rate = (value) => (value < 10 ? upToTenths : whole).format(value);

function milliseconds(value) {
  if (value > 0 && value < 0.1) return `< ${tenths.format(0.1)}\u00a0ms`;
  return `${(value < 100 ? tenths : whole).format(value)}\u00a0ms`;
}

// A length of time in seconds, or in minutes from two minutes up.
function length(ms) {
  const [unit, size] = ms < 120_000 ? ["second", 1000] : ["minute", 60_000];
  const format = new Intl.NumberFormat(language, { style: "unit", unit, unitDisplay: "long" });
  return format.format(Math.max(1, Math.round(ms / size)));
}

// Writes a time in the reader's time zone, with the date unless it is today's.
function writeTime(element, moment) {
  if (!element) return;
  const parts = element.closest(".axis") ? minutes : { ...minutes, second: "2-digit" };
  const isToday = moment.toDateString() === new Date().toDateString();
  const date = isToday ? "" : `${moment.toLocaleDateString(language, { dateStyle: "medium" })} `;
  element.dateTime = moment.toISOString();
  write(element, date + moment.toLocaleTimeString(language, parts));
}

// Unlike an assignment, this disturbs neither a selection nor a screen reader when nothing changes.
function write(element, text) {
  if (element && element.textContent !== text) element.textContent = text;
}

// The charts

const SECONDS = 600;
const INTERVAL = 5;
const HALF = INTERVAL / 2;
const INTERVALS = SECONDS / INTERVAL;
const slider = at("moment");
let rates = [];
let visits = [];

// The top of a scale: the lowest of 1, 2, 5, 10, … that no value exceeds.
function topOf(values) {
  const highest = Math.max(1, ...values.filter((value) => value !== null));
  const power = 10 ** Math.floor(Math.log10(highest));
  return [1, 2, 5, 10].map((step) => step * power).find((step) => step >= highest) ?? highest;
}

// A line through the values, broken where there is none. Each part is drawn from its first
// interval's start to its last one's end, so that a lone value is a dash.
function line(values, top) {
  return values
    .map((value, index) => {
      if (value === null) return "";
      const y = (100 * (1 - value / top)).toFixed(1);
      const isFirst = (values[index - 1] ?? null) === null;
      const isLast = (values[index + 1] ?? null) === null;
      const start = isFirst ? `M${x(index) - HALF} ${y}` : "";
      const end = isLast ? `h${HALF}` : "";
      return `${start}L${x(index)} ${y}${end}`;
    })
    .join("");
}

// The place of an interval's middle. The newest interval ends at the right edge.
const x = (index) => SECONDS - INTERVAL * (rates.length - index) + HALF;

function draw(snapshot) {
  rates = snapshot.replica.taxas;
  // Before the replica began there were no visits to count, which is not the same as none.
  const began = Date.parse(snapshot.replica.desde) - 1000 * INTERVAL;
  visits = rates.map((rate) => (Date.parse(rate.em) > began ? rate.visitas / INTERVAL : null));
  const [median, p99] = [rates.map((rate) => rate.p50_ms), rates.map((rate) => rate.p99_ms)];
  const [top, topMilliseconds] = [topOf(visits), topOf(p99)];
  const lineOfVisits = line(visits, top);
  at("visits-line").setAttribute("d", lineOfVisits);
  const first = x(visits.findIndex((value) => value !== null)) - HALF;
  at("visits-area").setAttribute("d", lineOfVisits && `${lineOfVisits}V100H${first}Z`);
  at("median-line").setAttribute("d", line(median, topMilliseconds));
  at("p99-line").setAttribute("d", line(p99, topMilliseconds));
  const bands = rates
    .map((rate, index) =>
      rate.falhas > 0 ? `M${x(index) - HALF} 0h${INTERVAL}v100h-${INTERVAL}Z` : "",
    )
    .join("");
  for (const path of document.querySelectorAll(".plot .failures")) path.setAttribute("d", bands);
  main.dataset.failures = bands === "" ? "none" : "some";
  const isEmpty = rates.every((rate) => rate.visitas + rate.falhas === 0);
  main.dataset.rates = isEmpty ? "none" : "some";

  at("visits-top").dataset.label = rate(top);
  at("visits-half").dataset.label = rate(top / 2);
  at("milliseconds-top").dataset.label = `${rate(topMilliseconds)}\u00a0ms`;
  at("milliseconds-half").dataset.label = `${rate(topMilliseconds / 2)}\u00a0ms`;
  const end = rates.length
    ? Date.parse(rates.at(-1).em) + 1000 * INTERVAL
    : Date.parse(snapshot.atualizado_em);
  writeTime(at("start"), new Date(end - 1000 * SECONDS));
  writeTime(at("middle"), new Date(end - 500 * SECONDS));
  writeTime(at("end"), new Date(end));
}

// Shows the numbers of the interval at which the slider stands: the newest, unless it was moved.
function showMoment() {
  const index = rates.length - INTERVALS + slider.valueAsNumber;
  const chosen = rates[index];
  const shown = (value, format) => (value === null || value === undefined ? "–" : format(value));
  write(at("now-visits"), shown(visits[index], rate));
  write(at("now-failures"), shown(chosen && chosen.falhas / INTERVAL, rate));
  write(at("now-median"), shown(chosen?.p50_ms, milliseconds));
  write(at("now-p99"), shown(chosen?.p99_ms, milliseconds));
  const isMoved = slider.valueAsNumber < INTERVALS - 1;
  const place = INTERVAL * slider.valueAsNumber + HALF;
  for (const path of document.querySelectorAll(".cursor"))
    path.setAttribute("d", isMoved ? `M${place} 0v100` : "");
  if (chosen) writeTime(at("moment-time"), new Date(chosen.em));
  else write(at("moment-time"), "–");
  const values = document.querySelectorAll(".values > span:not([hidden])");
  slider.setAttribute(
    "aria-valuetext",
    [at("moment-time"), ...values].map((part) => part.innerText.trim()).join(", "),
  );
}

slider.addEventListener("input", showMoment);
for (const plot of document.querySelectorAll(".plot")) {
  const svg = plot.querySelector("svg");
  const point = (event) => {
    const box = svg.getBoundingClientRect();
    slider.valueAsNumber = Math.min(
      INTERVALS - 1,
      Math.floor((INTERVALS * (event.clientX - box.left)) / box.width),
    );
    showMoment();
  };
  plot.addEventListener("pointermove", point);
  plot.addEventListener("pointerdown", point);
  plot.addEventListener("pointerleave", () => {
    slider.valueAsNumber = INTERVALS - 1;
    showMoment();
  });
}

// The stores

// How long the first seconds last: stores are read once a second.
const FIRST = 2500;

// How long a replica that has just started can call a store down that it has not reached yet.
const STARTING = 2000;

// An event's snapshot. Its totals become BigInts: a number of JavaScript holds no more than 2^53.
function parse(json) {
  const totals = /"(total_registros_db|visitas_redis)":(-?\d+)/g;
  const snapshot = JSON.parse(json.replace(totals, '"$1":"$2"'));
  for (const name of ["total_registros_db", "visitas_redis"])
    if (snapshot[name] !== null) snapshot[name] = BigInt(snapshot[name]);
  return snapshot;
}

// Writes a store's state and total, and returns whether its state has changed.
function showStore(store, status, total, moment) {
  const before = main.dataset[store];
  const [since, count] = [at(`${store}-since`), at(`${store}-total`)];
  if (status !== before) {
    const back = new Set((main.dataset.back ?? "").split(" "));
    if (status === "ok") {
      back.add(store);
      write(at(`${store}-away`), length(moment - new Date(since.dateTime)));
    } else {
      back.delete(store);
    }
    main.dataset.back = [...back].join(" ").trim();
    main.dataset[store] = status;
    writeTime(since, moment);
  }
  // The last known total stays through an outage, with its time.
  count.classList.toggle("old", total === null);
  // Another replica's reading can be older than this page's visit, which is in the total already.
  const isOld = performance.now() < FIRST && total < BigInt(count.value);
  if (total !== null && !isOld) {
    count.value = total;
    write(count, whole.format(total));
    writeTime(at(`${store}-read`), moment);
  }
  return status !== before;
}

function showTotals(rows, redis) {
  const [shown, inRedis] = ["postgres", "redis"].map((store) => BigInt(at(`${store}-total`).value));
  const difference = shown - inRedis;
  const comparison = difference > 0n ? "behind" : difference < 0n ? "ahead" : "same";
  main.dataset.difference = rows === null || redis === null ? "unknown" : comparison;
  for (const element of document.querySelectorAll(".difference"))
    write(element, whole.format(difference < 0n ? -difference : difference));
  const total = at("total");
  if (rows === null) {
    total?.classList.add("old");
    return;
  }
  if (main.dataset.visit !== "recorded") document.title = `${whole.format(rows)} · visitas`;
  if (total) {
    const digits = String(rows).length;
    write(total, whole.format(rows));
    total.className = `number digits-${[7, 10, 13].find((most) => digits <= most) ?? 19}`;
  }
}

function show(snapshot) {
  const moment = new Date(snapshot.atualizado_em);
  if (moment - new Date(snapshot.replica.desde) < STARTING) {
    if (snapshot.db_status !== "ok") snapshot.db_status = main.dataset.postgres;
    if (snapshot.redis_status !== "ok") snapshot.redis_status = main.dataset.redis;
  }
  const [rows, redis] = [snapshot.total_registros_db, snapshot.visitas_redis];
  const changes = [
    showStore("postgres", snapshot.db_status, rows, moment),
    showStore("redis", snapshot.redis_status, redis, moment),
  ];
  showTotals(rows, redis);
  if (rows !== null) writeTime(at("total-read"), moment);
  draw(snapshot);
  showForms();
  showMoment();
  writeTime(at("news"), moment);
  // The stream can lead to another replica once it was broken.
  write(at("replica"), snapshot.replica.id);
  writeTime(at("replica-since"), new Date(snapshot.replica.desde));
  // A screen reader hears of changes of state alone, not of each second.
  if (changes.includes(true)) {
    const notices = [...document.querySelectorAll(".notice:not([hidden])")];
    const texts = notices.map((notice) => notice.innerText.replace(/\s+/g, " "));
    write(at("announcement"), texts.join(" "));
  }
}

// The stream

const STALE_AFTER = 4000;
const CONNECT_AGAIN_AFTER = 5000;
let stream;
let lastNews = -Infinity;

// Only a visible page has a stream: the service has a bounded number of them.
function connect() {
  stream?.close();
  if (document.hidden) return;
  stream = new EventSource("/visitas/stream");
  stream.onmessage = (event) => {
    lastNews = performance.now();
    main.dataset.live = "on";
    show(parse(event.data));
    slider.disabled = false;
  };
  // The browser connects again after a broken connection, but not after a refusal.
  const connecting = stream;
  stream.onerror = () => {
    if (connecting.readyState === EventSource.CLOSED)
      setTimeout(() => connecting === stream && connect(), CONNECT_AGAIN_AFTER);
  };
}

setInterval(() => {
  if (main.dataset.live !== "on" || performance.now() - lastNews <= STALE_AFTER) return;
  main.dataset.live = "stale";
  showForms();
}, 1000);
document.addEventListener("visibilitychange", connect);
for (const element of document.querySelectorAll("time[datetime]"))
  writeTime(element, new Date(element.dateTime));
connect();
