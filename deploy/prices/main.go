// Command prices makes prices.json, the price list in the program, from a newer list of public prices:
//
//	go run ./deploy/prices NEWER-LIST.json
//
// Run it where prices.json is. Models that the newer list lacks keep their prices, with the date of the list that had
// them last, and models keep the other names that they had. Names match exactly: a dated snapshot of which the undated
// name is not listed gives its prices to that name, too. The result has one model a line and is the same for the same
// input; running the command with prices.json itself changes nothing.
package main

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"math/big"
	"os"
	"regexp"
	"slices"
	"strings"
)

func main() {
	if len(os.Args) != 2 {
		fmt.Fprintln(os.Stderr, "usage: go run ./deploy/prices NEWER-LIST.json")
		os.Exit(2)
	}
	if err := run(os.Args[1], "prices.json"); err != nil {
		fmt.Fprintln(os.Stderr, "prices:", err)
		os.Exit(1)
	}
}

func run(newer, current string) error {
	newText, err := os.ReadFile(newer)
	if err != nil {
		return err
	}
	oldText, err := os.ReadFile(current)
	if err != nil {
		return err
	}
	text, err := merge(newText, oldText)
	if err != nil {
		return err
	}
	return os.WriteFile(current, text, 0o644)
}

const about = "List prices in US dollars: per million tokens or characters, per minute, per picture, per query and " +
	"per call of a tool. Names are exact; a dated snapshot that is not listed costs what the undated model does. " +
	"above_input_tokens: the whole call costs this once its input is larger. service_tier: the tier that an answer " +
	"names. multiplier: of tokens, for us and eu data residency and for fast answers. unknown_above_input_tokens: " +
	"larger inputs cost more, but it is not known how much. tools: what tools cost with every model of a provider. " +
	"as_of of a model: the list that had it last. Public facts; prices change, and operators set their own."

// A list is a price list, in the form of prices.json or of the newer list.
type list struct {
	Date   string           `json:"as_of"`
	Models []map[string]any `json:"models"`
}

func parse(text []byte) (list, error) {
	var l list
	d := json.NewDecoder(bytes.NewReader(text))
	d.UseNumber()
	if err := d.Decode(&l); err != nil {
		return l, err
	}
	if l.Date == "" || len(l.Models) == 0 {
		return l, errors.New("the list has no date or no models")
	}
	return l, nil
}

// merge returns prices.json made of a newer list and the current one.
func merge(newer, current []byte) ([]byte, error) {
	next, err := parse(newer)
	if err != nil {
		return nil, fmt.Errorf("the newer list: %w", err)
	}
	old, err := parse(current)
	if err != nil {
		return nil, fmt.Errorf("prices.json: %w", err)
	}
	var models []*model
	owner := map[string]*model{} // by provider and name
	for _, source := range next.Models {
		prices, err := convert(source)
		if err != nil {
			return nil, fmt.Errorf("%v %v: %w", source["provider"], source["model"], err)
		}
		if len(prices) == 2 { // the names only
			continue
		}
		m := &model{prices}
		if owner[m.key(m.name())] != nil {
			return nil, fmt.Errorf("%s is listed twice", m.key(m.name()))
		}
		models = append(models, m)
		owner[m.key(m.name())] = m
	}
	nameUndated(models, owner)
	for _, source := range old.Models {
		prices, err := convert(source)
		if err != nil {
			return nil, fmt.Errorf("prices.json: %w", err)
		}
		models = keep(models, owner, &model{prices}, old.Date)
	}
	slices.SortFunc(models, func(a, b *model) int { return strings.Compare(a.key(a.name()), b.key(b.name())) })
	return format(next.Date, models), nil
}

// A model is one entry of a list.
type model struct{ members map[string]any }

func (m *model) name() string { return m.members["model"].(string) }

// key returns the provider with a name of the model.
func (m *model) key(name string) string { return m.members["provider"].(string) + " " + name }

// names returns the model's other names.
func (m *model) names() (out []string) {
	list, _ := m.members["names"].([]any)
	for _, n := range list {
		out = append(out, n.(string))
	}
	return out
}

func (m *model) setNames(names []string) {
	delete(m.members, "names")
	slices.Sort(names)
	var list []any
	for _, n := range slices.Compact(names) {
		list = append(list, n)
	}
	if list != nil {
		m.members["names"] = list
	}
}

// keep adds an older model to models. If the newer list has it under one of its names, only its other names are kept.
func keep(models []*model, owner map[string]*model, m *model, date string) []*model {
	all := append([]string{m.name()}, m.names()...)
	target := m
	for _, n := range all {
		if o := owner[m.key(n)]; o != nil {
			target = o
			break
		}
	}
	var others []string
	for _, n := range all {
		if owner[m.key(n)] == nil {
			owner[m.key(n)] = target
			others = append(others, n)
		}
	}
	if len(others) == 0 {
		return models
	}
	if target != m {
		target.setNames(append(target.names(), others...))
		return models
	}
	m.setNames(slices.DeleteFunc(others, func(n string) bool { return n == m.name() }))
	if m.members["as_of"] == nil {
		m.members["as_of"] = date
	}
	return append(models, m)
}

// nameUndated gives undated names that are not listed to the latest snapshot. Fine-tuned models have no such name:
// there is one price for each base.
func nameUndated(models []*model, owner map[string]*model) {
	latest := map[string]*model{}
	dated := regexp.MustCompile(`^(.+)-\d{4}-\d{2}-\d{2}$`)
	for _, m := range models {
		if match := dated.FindStringSubmatch(m.name()); match != nil && !strings.HasPrefix(m.name(), "ft:") {
			k := m.key(match[1])
			if o := latest[k]; owner[k] == nil && (o == nil || m.name() > o.name()) {
				latest[k] = m
			}
		}
	}
	for k, m := range latest {
		owner[k] = m
		_, undated, _ := strings.Cut(k, " ")
		m.setNames(append(m.names(), undated))
	}
}

// tokenKinds are the kinds of tokens, in the order in which they are written.
func tokenKinds() []string {
	return []string{"input", "cached_input", "cache_write", "cache_write_1h", "audio_input", "cached_audio_input",
		"image_input", "cached_image_input", "output", "reasoning_output", "audio_output", "image_output"}
}

// convert returns the members of a model of the newer list in the form of prices.json. Running it again changes
// nothing.
func convert(source map[string]any) (map[string]any, error) {
	m := map[string]any{}
	mode, _ := source["mode"].(string)
	for member, v := range source {
		switch member {
		case "per_unit":
			for unit, price := range v.(map[string]any) {
				if err := convertUnit(m, mode, unit, price.(json.Number)); err != nil {
					return nil, err
				}
			}
		case "web_search_call":
			if sizes, ok := v.(map[string]any); ok {
				for size, price := range sizes {
					m["web_search_call_"+size] = decimal(price.(json.Number), 1, 12)
				}
			} else {
				m[member] = decimal(v.(json.Number), 1, 12)
			}
		case "mode", "shut_down":
		default:
			m[member] = v
		}
	}
	if m["provider"] == "anthropic" {
		deriveHourWrites(m)
	}
	return m, nil
}

// convertUnit converts a price per second, character, picture or query. Where a picture model has one price for
// pictures, it is that of the pictures that it makes.
func convertUnit(m map[string]any, mode, unit string, price json.Number) error {
	switch unit {
	case "input_second":
		m["input_minute"] = decimal(price, 60, 9)
	case "output_second":
		if mode != "audio_transcription" { // its output is text
			m["output_minute"] = decimal(price, 60, 9)
		}
	case "input_character":
		m["input_character"] = decimal(price, 1_000_000, 6)
	case "input_image":
		if mode == "image_generation" {
			if m["output_picture"] == nil {
				m["output_picture"] = decimal(price, 1, 12)
			}
		} else {
			m["input_picture"] = decimal(price, 1, 12)
		}
	case "output_image":
		m["output_picture"] = decimal(price, 1, 12)
	case "query":
		m["query"] = decimal(price, 1, 12)
	default:
		return fmt.Errorf("the unit %q is not known", unit)
	}
	return nil
}

// deriveHourWrites adds the prices of cache writes for an hour that the list leaves out: the provider's price page
// says that they cost twice the input, in every tier.
func deriveHourWrites(m map[string]any) {
	if m["cache_write"] != nil && m["cache_write_1h"] == nil {
		m["cache_write_1h"] = decimal(m["input"].(json.Number), 2, 6)
	}
	for _, member := range []string{"above_input_tokens", "service_tier", "above"} {
		parts, _ := m[member].(map[string]any)
		for _, part := range parts {
			deriveHourWrites(part.(map[string]any))
		}
	}
}

// decimal returns n times factor without an exponent, rounded to a number of places: seconds of a price per minute
// are listed with fewer digits than they have.
func decimal(n json.Number, factor int64, places int) json.Number {
	r, ok := new(big.Rat).SetString(n.String())
	if !ok {
		return n
	}
	text := r.Mul(r, big.NewRat(factor, 1)).FloatString(places)
	return json.Number(strings.TrimRight(strings.TrimRight(text, "0"), "."))
}

// tools are the prices of tools that providers charge with every model, by their price pages.
const tools = `{"anthropic": {"web_search_call": 0.01}, "x-ai": {"search_source": 0.025}, ` +
	`"openai": {"file_search_call": 0.0025, "code_interpreter_session": 0.03}}`

func format(date string, models []*model) []byte {
	var b bytes.Buffer
	fmt.Fprintf(&b, "{\n\"about\": %s,\n\"as_of\": %s,\n", quote(about), quote(date))
	fmt.Fprintf(&b, "\"currency\": \"USD\",\n\"per_tokens\": 1000000,\n\"tools\": %s,\n", tools)
	b.WriteString("\"models\": [\n")
	for i, m := range models {
		writeValue(&b, m.members)
		if i < len(models)-1 {
			b.WriteByte(',')
		}
		b.WriteByte('\n')
	}
	b.WriteString("]\n}\n")
	return b.Bytes()
}

// writeValue writes v on one line. Members come in a fixed order; those that the order does not name, by name.
func writeValue(b *bytes.Buffer, v any) {
	switch v := v.(type) {
	case map[string]any:
		order := append(append([]string{"provider", "model", "names", "as_of"}, tokenKinds()...), "input_minute",
			"output_minute", "input_character", "input_picture", "output_picture", "query", "web_search_call",
			"web_search_call_low", "web_search_call_medium", "web_search_call_high", "above_input_tokens",
			"service_tier", "batch", "flex", "priority", "ultrafast", "above", "multiplier", "us", "eu", "fast",
			"unknown_above_input_tokens")
		var rest []string
		for k := range v {
			if !slices.Contains(order, k) {
				rest = append(rest, k)
			}
		}
		slices.Sort(rest)
		b.WriteByte('{')
		sep := ""
		for _, k := range append(order, rest...) {
			if value, ok := v[k]; ok {
				b.WriteString(sep + quote(k) + ": ")
				writeValue(b, value)
				sep = ", "
			}
		}
		b.WriteByte('}')
	case []any:
		b.WriteByte('[')
		for i, e := range v {
			if i > 0 {
				b.WriteString(", ")
			}
			writeValue(b, e)
		}
		b.WriteByte(']')
	case string:
		b.WriteString(quote(v))
	case json.Number:
		if strings.ContainsAny(v.String(), ".eE") {
			v = decimal(v, 1, 12)
		}
		b.WriteString(v.String())
	default:
		fmt.Fprint(b, v)
	}
}

func quote(s string) string {
	text, _ := json.Marshal(s)
	return string(text)
}
