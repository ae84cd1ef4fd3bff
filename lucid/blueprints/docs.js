
"use strict";
// Whatever comes from the document or from an answer becomes text nodes: there is no way from data to markup here.
(() => {
  const METHODS = ["get", "post", "put", "patch", "delete"];
  const CREDENTIALS = { apiKey: "X-API-Key", bearer: "Authorization: Bearer" };
  const SHOWN_CHARACTERS = 200000;
  const byId = (id) => document.getElementById(id);
  const kind = byId("credential-kind");
  const credential = byId("credential");
  let api = {};
  let forms = 0;

  const element = (tag, className, ...children) => {
    const made = document.createElement(tag);
    if (className) made.className = className;
    made.append(...children.filter((child) => child !== null && child !== undefined));
    return made;
  };
  const code = (text) => element("code", "", String(text));

  // --- texts: paragraphs, lists of `- `, code in backticks ---

  const inline = (text) =>
    text.split("`").map((part, at) => (at % 2 ? code(part) : part)).filter((part) => part !== "");

  const prose = (text) => {
    const made = element("div", "prose");
    for (const block of String(text || "").split(/\n\s*\n/)) {
      const lines = block.split("\n").map((line) => line.trim()).filter(Boolean);
      if (lines.length && lines.every((line) => line.startsWith("- "))) {
        made.append(element("ul", "", ...lines.map((line) => element("li", "", ...inline(line.slice(2))))));
      } else if (lines.length) {
        made.append(element("p", "", ...inline(lines.join(" "))));
      }
    }
    return made;
  };

  // --- schemas ---

  const resolve = (value) => {
    let found = value || {};
    for (let hops = 0; typeof found.$ref === "string" && hops < 20; hops++) {
      const names = found.$ref.split("/").slice(1).map((name) => name.replace(/~1/g, "/").replace(/~0/g, "~"));
      found = names.reduce((at, name) => (at && Object.hasOwn(at, name) ? at[name] : {}), api);
    }
    return found;
  };

  const refName = (schema) => (typeof schema.$ref === "string" ? schema.$ref.split("/").pop() : "");

  const merged = (schema) => {
    const parts = (schema.allOf || []).map(resolve);
    if (!parts.length) return schema;
    return Object.assign({}, ...parts, { properties: Object.assign({}, ...parts.map((part) => part.properties)) });
  };

  const bounds = (schema) => {
    const said = [];
    const range = (low, high, what) => {
      if (low === undefined && high === undefined) return;
      if (low === high) {
        said.push(low + what);
        return;
      }
      const from = low === undefined ? "" : `from ${low}`;
      const to = high === undefined ? "" : `to ${high}`;
      said.push([from, to].filter(Boolean).join(" ") + what);
    };
    range(schema.minLength, schema.maxLength, " characters");
    range(schema.minimum, schema.maximum, "");
    range(schema.minItems, schema.maxItems, " items");
    range(schema.minProperties, schema.maxProperties, " names");
    if (schema.exclusiveMinimum !== undefined) said.push(`above ${schema.exclusiveMinimum}`);
    if (schema.exclusiveMaximum !== undefined) said.push(`below ${schema.exclusiveMaximum}`);
    return said.join(", ");
  };

  const typeText = (schema, depth = 0) => {
    if (depth > 8) return "…";
    const told = merged(resolve(schema));
    if (told.const !== undefined) return JSON.stringify(told.const);
    if (told.enum) return told.enum.map((value) => JSON.stringify(value)).join(" or ");
    const options = told.anyOf || told.oneOf;
    if (options) return options.map((option) => typeText(option, depth + 1)).join(" or ");
    if (told.type === "array") return `list of ${typeText(told.items || {}, depth + 1)}`;
    const name = refName(schema) || told.title || "";
    if (told.type === "object") return name ? `object ${name}` : "object";
    return [told.type || "any value", told.format ? `(${told.format})` : ""].filter(Boolean).join(" ");
  };

  const facts = (schema) => {
    const told = resolve(schema);
    const made = [];
    const limits = bounds(told);
    if (limits) made.push(`, ${limits}`);
    if (told.default !== undefined && told.default !== null) made.push(", without it ", code(JSON.stringify(told.default)));
    if (told.pattern) made.push(", as ", code(told.pattern));
    return made;
  };

  const within = (schema) => {
    const told = merged(resolve(schema));
    if (told.properties) return [told];
    if (told.type === "array") return within(told.items || {});
    return (told.anyOf || told.oneOf || []).flatMap(within);
  };

  const tree = (schema, depth = 0) => {
    const list = element("ul", "tree");
    for (const told of within(schema)) {
      const required = new Set(told.required || []);
      for (const [name, property] of Object.entries(told.properties)) {
        const item = element("li", "", code(name), " ", typeText(property), ...facts(property));
        if (required.has(name)) item.append(" ", element("span", "must", "required"));
        const text = resolve(property).description;
        if (text && !property.$ref) item.append(prose(text));
        if (depth < 6 && within(property).length) item.append(tree(property, depth + 1));
        list.append(item);
      }
    }
    return list;
  };

  const bodyOf = (schema) => {
    const told = resolve(schema);
    const options = told.anyOf || told.oneOf;
    if (!options) return element("div", "", element("p", "", typeText(schema), ...facts(schema)), tree(schema));
    return element("div", "", element("p", "", "One of:"), ...options.map(bodyOf));
  };

  const sample = (schema, depth = 0) => {
    const told = merged(resolve(schema));
    if (depth > 6) return null;
    if (told.examples && told.examples.length) return told.examples[0];
    if (told.const !== undefined) return told.const;
    if (told.enum) return told.enum[0];
    const options = told.anyOf || told.oneOf;
    if (options) return sample(options[0], depth + 1);
    if (told.properties) {
      const names = told.required && told.required.length ? told.required : Object.keys(told.properties);
      return Object.fromEntries(names.map((name) => [name, sample(told.properties[name] || {}, depth + 1)]));
    }
    if (told.type === "array") return [];
    if (told.type === "object") return {};
    if (told.type === "boolean") return false;
    if (told.type === "integer" || told.type === "number") return told.default ?? told.minimum ?? 0;
    return told.type === "string" ? "" : null;
  };

  // --- an operation ---

  const parametersOf = (operation) => (operation.parameters || []).map(resolve);

  const aboutParameters = (parameters) =>
    element("ul", "tree", ...parameters.map((parameter) => element("li", "",
      code(parameter.name), ` in the ${parameter.in}: `, typeText(parameter.schema || {}), ...facts(parameter.schema || {}),
      parameter.required ? element("span", "must", " required") : null,
      parameter.description ? prose(parameter.description) : null)));

  const aboutAnswer = (status, answer) => {
    const told = resolve(answer);
    const isError = !/^2/.test(status);
    const title = status === "default" ? "any other" : status;
    const made = element("details", "answer",
      element("summary", "", element("strong", "", title), " ", isError ? "" : told.description || ""));
    if (isError) made.append(prose(told.description));
    for (const [media, content] of Object.entries(told.content || {})) {
      made.append(element("p", "quiet", media), isError ? element("p", "", "The error envelope.") : bodyOf(content.schema || {}));
    }
    const headers = Object.entries(told.headers || {});
    if (headers.length) {
      made.append(element("p", "quiet", "Fields"), element("ul", "tree", ...headers.map(([name, header]) => {
        const field = resolve(header);
        return element("li", "", code(name), " ", typeText(field.schema || {}),
          field.required ? element("span", "must", " always") : null, field.description ? prose(field.description) : null);
      })));
    }
    return made;
  };

  const aboutAccess = (operation) => {
    const schemes = (operation.security || []).flatMap((each) => Object.keys(each));
    const role = operation["x-lucid-access"];
    if (!schemes.length) return "Everybody may call it.";
    if ((operation.security || []).some((each) => !Object.keys(each).length)) {
      return "Everybody may call it; a credential makes it count as its owner's.";
    }
    return `Needs a credential${role && role !== "user" ? ` with the role ${role} or above` : ""}: ` +
      schemes.map((name) => CREDENTIALS[name] || name).join(" or ") + ".";
  };

  const labelled = (text, input) => element("label", "wide", text, input);

  const tryIt = (method, path, operation) => {
    const form = element("form", "try");
    const number = ++forms;
    const inputs = parametersOf(operation).filter((parameter) => parameter.in === "path" || parameter.in === "query")
      .map((parameter) => {
        const input = element("input", "");
        input.type = "text";
        input.autocomplete = "off";
        input.spellcheck = false;
        input.required = parameter.in === "path";
        form.append(labelled(`${parameter.name}${input.required ? " (required)" : ""}`, input));
        return [parameter, input];
      });
    const request = operation.requestBody ? resolve(operation.requestBody) : null;
    const content = request ? Object.entries(request.content || {})[0] : null;
    const body = content ? element("textarea", "") : null;
    if (body) {
      body.spellcheck = false;
      body.value = JSON.stringify(sample(content[1].schema || {}), null, 2);
      form.append(labelled("Body", body));
    }
    const button = element("button", "send", "Send");
    button.type = "submit";
    const output = element("pre", "");
    output.id = `answer-${number}`;
    output.hidden = true;
    output.tabIndex = 0;
    const state = element("p", "quiet");
    state.setAttribute("role", "status");
    form.append(button, state, output);

    form.addEventListener("submit", async (event) => {
      event.preventDefault();
      button.disabled = true;
      state.textContent = "Sent, waiting …";
      try {
        const started = performance.now();
        const answer = await send(method, path, inputs, body ? body.value : "", content ? content[0] : "");
        const milliseconds = Math.round(performance.now() - started);
        state.textContent = `${answer.status} ${answer.statusText} after ${milliseconds} ms`;
        output.textContent = await spelled(answer);
      } catch (error) {
        state.textContent = "No answer";
        output.textContent = String(error);
      }
      output.hidden = false;
      button.disabled = false;
    });
    return form;
  };

  const send = (method, path, inputs, body, media) => {
    let target = path;
    const query = new URLSearchParams();
    for (const [parameter, input] of inputs) {
      if (parameter.in === "path") {
        target = target.split(`{${parameter.name}}`).join(encodeURIComponent(input.value));
      } else if (input.value !== "") {
        query.append(parameter.name, input.value);
      }
    }
    const headers = {};
    if (kind.value === "bearer") headers.Authorization = `Bearer ${credential.value.trim()}`;
    if (kind.value === "key") headers["X-API-Key"] = credential.value.trim();
    if (body) headers["Content-Type"] = media;
    const text = query.toString();
    return fetch(text ? `${target}?${text}` : target, {
      method: method.toUpperCase(), headers, body: body || undefined, credentials: "omit", cache: "no-store", redirect: "error",
    });
  };

  const spelled = async (answer) => {
    const fields = [...answer.headers].map(([name, value]) => `${name}: ${value}`).join("\n");
    let text = await answer.text();
    try {
      text = JSON.stringify(JSON.parse(text), null, 2);
    } catch {
      // Not JSON: it is shown as it came.
    }
    return `${fields}\n\n${text.slice(0, SHOWN_CHARACTERS)}`;
  };

  const fill = (inside, method, path, operation) => {
    const parameters = parametersOf(operation);
    const request = operation.requestBody ? resolve(operation.requestBody) : null;
    if (operation.description) inside.append(prose(operation.description));
    inside.append(element("p", "", aboutAccess(operation)));
    const limits = operation["x-lucid-limits"];
    if (Array.isArray(limits)) inside.append(element("p", "", `Limits besides the caller's tier: ${limits.join("; ")}.`));
    if (parameters.length) inside.append(element("h4", "", "Parameters"), aboutParameters(parameters));
    if (request) {
      inside.append(element("h4", "", request.required ? "Body" : "Body (may be left out)"), prose(request.description));
      for (const content of Object.values(request.content || {})) inside.append(bodyOf(content.schema || {}));
    }
    inside.append(element("h4", "", "Answers"));
    for (const [status, answer] of Object.entries(operation.responses || {})) inside.append(aboutAnswer(status, answer));
    inside.append(element("h4", "", "Try it"), element("p", "quiet", "This sends a real request to this gateway."),
      tryIt(method, path, operation));
  };

  const operationOf = (method, path, operation) => {
    const id = String(operation.operationId || `${method}-${path}`);
    const inside = element("div", "inside");
    inside.hidden = true;
    inside.id = `inside-${id}`;
    const badge = () => element("span", `method ${method}`, method.toUpperCase());
    const summary = element("span", "quiet", operation.summary || "");
    const button = element("button", "", badge(), element("span", "path", path), summary);
    button.type = "button";
    button.setAttribute("aria-expanded", "false");
    button.setAttribute("aria-controls", inside.id);
    const article = element("article", "operation", element("h3", "", button), inside);
    article.id = id;
    const open = (wanted) => {
      if (wanted && !inside.childNodes.length) fill(inside, method, path, operation);
      inside.hidden = !wanted;
      button.setAttribute("aria-expanded", String(wanted));
    };
    button.addEventListener("click", () => open(inside.hidden));
    const link = element("a", "", badge(), " ", path);
    link.href = `#${encodeURIComponent(id)}`;
    const entry = element("li", "", link);
    const words = [method, path, id, operation.summary, operation.description].join(" ").toLowerCase();
    return { id, article, entry, open, words };
  };

  // --- the page ---

  const show = (told) => {
    api = told;
    const info = api.info || {};
    byId("title").textContent = [info.title, info.version].filter(Boolean).join(" ");
    document.title = String(info.title || "API");
    byId("about").append(prose(info.description));
    const tags = new Map((api.tags || []).map((tag) => [tag.name, []]));
    for (const [path, item] of Object.entries(api.paths || {})) {
      for (const method of METHODS.filter((each) => Object.hasOwn(item, each))) {
        const operation = item[method];
        const tag = (operation.tags || ["other"])[0];
        if (!tags.has(tag)) tags.set(tag, []);
        tags.get(tag).push(operationOf(method, path, operation));
      }
    }
    const all = [];
    for (const [tag, operations] of tags) {
      const section = element("section", "", element("h2", "", String(tag).replace(/_/g, " ")),
        ...operations.map((each) => each.article));
      const entries = element("div", "", element("strong", "", String(tag).replace(/_/g, " ")),
        element("ul", "", ...operations.map((each) => each.entry)));
      byId("main").append(section);
      byId("contents").append(entries);
      all.push({ section, entries, operations });
    }
    byId("state").hidden = true;

    byId("find").addEventListener("input", () => {
      const words = byId("find").value.toLowerCase().split(/\s+/).filter(Boolean);
      let count = 0;
      for (const { section, entries, operations } of all) {
        let some = false;
        for (const each of operations) {
          const fits = words.every((word) => each.words.includes(word));
          each.article.hidden = each.entry.hidden = !fits;
          some = some || fits;
          count += fits ? 1 : 0;
        }
        section.hidden = entries.hidden = !some;
      }
      byId("found").textContent = words.length ? `${count} found` : "";
    });

    const goTo = () => {
      const wanted = location.hash.slice(1);
      for (const { operations } of all) {
        for (const each of operations.filter((one) => encodeURIComponent(one.id) === wanted)) {
          each.open(true);
          each.article.scrollIntoView();
        }
      }
    };
    addEventListener("hashchange", goTo);
    goTo();
  };

  kind.addEventListener("change", () => {
    credential.disabled = !kind.value;
    if (!kind.value) credential.value = "";
  });

  fetch("/openapi.json", { credentials: "omit" })
    .then((answer) => {
      if (!answer.ok) throw new Error(`the gateway answered ${answer.status}`);
      return answer.json();
    })
    .then(show)
    .catch((error) => {
      byId("state").textContent = `The document could not be read: ${error.message}`;
    });
})();
