// A request as somebody would send it without this page.

const shell = (text) => `'${text.replaceAll("'", "'\\''")}'`;

export function curl(request, url, keyed) {
  const single = (request.num_images ?? 1) === 1;
  const format = request.output_format ?? "png";
  const accept = single ? `image/${format}` : "application/json";
  return [
    `curl ${shell(`${url}api/v1/images`)}`,
    ...(keyed ? ['  -H "Authorization: Bearer $MADFORMER_API_KEY"'] : []),
    "  -H 'Content-Type: application/json'",
    `  -H ${shell(`Accept: ${accept}`)}`,
    `  --data-raw ${shell(JSON.stringify(request))}`,
    `  --fail-with-body --output ${single ? `picture.${format}` : "pictures.json"}`,
  ].join(" \\\n");
}

const literal = (value) => {
  if (value === null) return "None";
  if (typeof value === "boolean") return value ? "True" : "False";
  if (Array.isArray(value)) return `[${value.map(literal).join(", ")}]`;
  return JSON.stringify(value);
};

export function python(request, url, keyed) {
  const { prompt, ...rest } = request;
  const given = [
    ...(prompt === undefined ? [] : [literal(prompt)]),
    ...Object.entries(rest).map(([name, value]) => `${name}=${literal(value)}`),
  ];
  return [
    ...(keyed ? ["import os", ""] : []),
    "from madformer.serving.client import Client",
    "",
    `client = Client(${literal(url)}${keyed ? ', os.environ["MADFORMER_API_KEY"]' : ""})`,
    `for picture in client.images(${given.join(", ")}):`,
    `    picture.save(f"{picture.seed}.${request.output_format ?? "png"}")`,
  ].join("\n");
}
