package main

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"mime/multipart"
	"strings"
	"testing"
)

const formType = "multipart/form-data; boundary=xyz"

// form writes parts as "headers|value" with the common header for a bare "name=value".
func form(parts ...string) string {
	var b strings.Builder
	for _, p := range parts {
		head, value, ok := strings.Cut(p, "|")
		if !ok {
			name, v, _ := strings.Cut(p, "=")
			head, value = `Content-Disposition: form-data; name="`+name+`"`, v
		}
		b.WriteString("--xyz\r\n" + head + "\r\n\r\n" + value + "\r\n")
	}
	return b.String() + "--xyz--\r\n"
}

func TestScanForm(t *testing.T) {
	t.Parallel()
	const disp = "Content-Disposition: form-data; "
	for _, c := range []struct {
		contentType, body string
		want              callFields
	}{
		{formType, form("model=whisper-1", "stream=true", "n=2"), callFields{model: "whisper-1", stream: true, n: 2}},
		{`Multipart/Form-Data; Boundary="xyz"; charset=UTF-8`, form("model=a"), callFields{model: "a", n: 1}},
		{formType, strings.TrimSuffix(form("model=a"), "\r\n"), callFields{model: "a", n: 1}},
		{formType, form(disp+"name=\"file\"; filename=\"a.mp3\"\r\nContent-Type: audio/mpeg|ID3\r\n\r\n--xy\x00\xff", "model=a"), callFields{model: "a", n: 1}},
		{formType, form(disp+"name=file; filename=a.mp3; filename*=utf-8''a.mp3|x", disp+"name=model\r\nContent-Type: text/plain; charset=utf-8|a"), callFields{model: "a", n: 1}},
		{formType, form("model=a", "include[]=logprobs", "include[]=x", "file=", disp+`name="image[]"; filename="ü.png"|x`), callFields{model: "a", n: 1}},
		{formType, form("content-disposition:form-data;name=\"model\"\r\nContent-Length: 1\r\nContent-Transfer-Encoding: 8bit|a"), callFields{model: "a", n: 1}},
		{formType, form("conversation=c", "n="), callFields{n: 1, stateRef: "conversation"}},
		{formType, form("models=b"), callFields{n: 1, otherModels: "models"}},
		{formType, form(disp + "name=\"prompt\"\r\nContent-Type: text/plain; charset=utf-16|x"), callFields{n: 1}},
	} {
		got, err := scanForm(c.contentType, []byte(c.body))
		renamed := withModel([]byte(c.body), got, false, "renamed")
		movable := got.modelAt.to > 0
		got.modelAt = bodySplice{}
		if err != nil || got != c.want {
			t.Errorf("%q: got %+v, %v; want %+v", c.body, got, err, c.want)
		}
		if movable != (c.want.model != "" && !strings.Contains(c.body, "Content-Length")) {
			t.Errorf("%q: the model can be replaced: %v", c.body, movable)
		}
		if again, err := scanForm(c.contentType, renamed); movable && (err != nil || again.model != "renamed" || len(renamed)-len(c.body) != len("renamed")-len(got.model)) {
			t.Errorf("%q: with another model: %q: %v", c.body, renamed, err)
		}
	}
}

func TestScanFormRefuses(t *testing.T) {
	t.Parallel()
	const disp = "Content-Disposition: form-data; "
	good := form("model=a")
	for _, c := range []struct{ contentType, body, param string }{
		{"", good, ""},
		{"multipart/form-data", good, ""},
		{"multipart/mixed; boundary=xyz", good, ""},
		{"application/json", good, ""},
		{formType + "; boundary=xyz", good, ""},
		{formType + "; boundary*=utf-8''xyz", good, ""},
		{formType + "; x=y", good, ""},
		{formType + "; charset=utf-16", good, ""},
		{formType + ", multipart/form-data; boundary=abc", good, ""},
		{formType + ";", good, ""},
		{"multipart/form-data; boundary=\"xyz", good, ""},
		{"multipart/form-data; boundary=\"x\\yz\"", good, ""},
		{"multipart/form-data; boundary=\"\"", good, ""},
		{"multipart/form-data; boundary=" + strings.Repeat("x", 71), good, ""},
		{"multipart/form-data; boundary=" + strings.Repeat("x", 100_000), good, ""},
		{formType, "", ""},
		{formType, "--xyz--\r\n", ""},
		{formType, "preamble\r\n" + good, ""},
		{formType, "\r\n" + good, ""},
		{formType, good + "epilogue", ""},
		{formType, good + good, ""},
		{formType, strings.TrimSuffix(good, "\r\n") + "\n", ""},
		{formType, strings.TrimSuffix(good, "\r\n") + " ", ""},
		{formType, strings.TrimSuffix(good, "--xyz--\r\n"), ""},
		{formType, strings.TrimSuffix(good, "--\r\n"), ""},
		{formType, strings.ReplaceAll(good, "\r\n", "\n"), ""},
		{formType, strings.Replace(good, "--xyz\r\n", "--xyz \r\n", 1), ""},
		{formType, strings.Replace(good, "--xyz\r\n", "--xyz\n", 1), ""},
		{formType, form(disp + "name=\"file\"; filename=\"a\"|x--xyzq"), ""},
		{formType, form(disp + "name=\"file\"; filename=\"a\"|x\n--xyz\r\n" + disp + "name=\"model\"\r\n\r\nb"), ""},
		{formType, "--xyz\r\n--xyz--\r\n", ""},
		{formType, "--xyz\r\n\r\n--xyz--\r\n", ""},
		{formType, "--xyz\r\n" + disp + "name=\"model\"\r\n\r\n--xyz--\r\n", ""},
		{formType, form("model=a", "model=b"), "model"},
		{formType, form("Model=a"), "model"},
		{formType, form("model[]=a"), "model"},
		{formType, form("models[]=a"), "models"},
		{formType, form("model[x=a"), "model"},
		{formType, form("stream_options[include_usage]=a"), "stream_options"},
		{formType, form(disp + "name=\"model\"; filename=\"a\"|a"), "model"},
		{formType, form(disp + "name=\"model\"; filename*=utf-8''a|a"), "model"},
		{formType, form(disp + "name=\"model\"\r\nContent-Type: text/plain; charset=utf-7|a"), "model"},
		{formType, form(disp + "name=\"model\"\r\nContent-Type: application/json|\"a\""), "model"},
		{formType, form("model="), "model"},
		{formType, form("model=é"), "model"},
		{formType, form("model=a\r\n"), "model"},
		{formType, form("model=" + strings.Repeat("x", 257)), "model"},
		{formType, form("stream=True"), "stream"},
		{formType, form("stream="), "stream"},
		{formType, form("n=4_0"), "n"},
		{formType, form("n= 4"), "n"},
		{formType, form("mod%65l=a"), ""},
		{formType, form(" model=a"), ""},
		{formType, form("_charset_=utf-7"), ""},
		{formType, form("=a"), ""},
		{formType, form(disp + "filename=\"a\"|x"), ""},
		{formType, form(disp + "name*=utf-8''model|x"), ""},
		{formType, form(disp + "name=\"file\"; name*=utf-8''model|x"), ""},
		{formType, form(disp + "name=\"file\"; name=\"model\"|x"), ""},
		{formType, form(disp + "name=\"file\"; NAME=\"model\"|x"), ""},
		{formType, form(disp + "name=\"mo\\del\"|x"), ""},
		{formType, form(disp + `name="file"; filename="a\"; name="model"|x`), ""},
		{formType, form(disp + `name="file"; filename="a\b"|x`), ""},
		{formType, form(disp + `name="file"; filename="a; name=model"|x`), ""},
		{formType, form(disp + `name="file" filename="a"|x`), ""},
		{formType, form(disp + `name="file"; size=3|x`), ""},
		{formType, form("Content-Disposition: attachment; name=\"file\"|x"), ""},
		{formType, form("Content-Disposition: form-data|x"), ""},
		{formType, form("Content-Type: text/plain|x"), ""},
		{formType, form(disp + "name=\"a\"\r\n" + disp + "name=\"model\"|x"), ""},
		{formType, form(disp + "name=\"a\"\r\ncontent-disposition: form-data; name=\"model\"|x"), ""},
		{formType, form("Content-Disposition: form-data;\r\n name=\"model\"|x"), ""},
		{formType, form("Content-Disposition : form-data; name=\"model\"|x"), ""},
		{formType, form(disp + "name=\"a\"\nContent-Type: text/plain|x"), ""},
		{formType, form(disp + "name=\"a\"; filename=\"\x00\"|x"), ""},
		{formType, form(disp + "name=\"a\"\r\nContent-Encoding: gzip|x"), ""},
		{formType, form(disp + "name=\"a\"\r\nContent-Transfer-Encoding: base64|x"), ""},
		{formType, form(disp + "name=\"a\"\r\nContent-Length: 9|x"), ""},
		{formType, form(disp + "name=\"a\"; filename=\"" + strings.Repeat("x", 1<<20) + "\"|x"), ""},
		{formType, form(make([]string, 100_000)...), ""},
	} {
		_, err := scanForm(c.contentType, []byte(c.body))
		if e, ok := errors.AsType[*bodyError](err); !ok || e.param != c.param || len(e.msg) > 200 {
			t.Errorf("%.80q %.120q: got %v; want an error for parameter %q", c.contentType, c.body, err, c.param)
		}
	}
	many := make([]string, maxFormParts+1)
	for i := range many {
		many[i] = fmt.Sprintf("f%d=", i)
	}
	if _, err := scanForm(formType, []byte(form(many[1:]...))); err != nil {
		t.Errorf("%d parts: %v", maxFormParts, err)
	}
	if _, err := scanForm(formType, []byte(form(many...))); err == nil {
		t.Errorf("%d parts: accepted", len(many))
	}
}

func FuzzScanForm(f *testing.F) {
	for _, s := range []string{
		form("model=a", "stream=true"), form("file=", "model=whisper-1", "n=1"),
		form("Content-Disposition: form-data; name=file; filename=\"a b\"\r\nContent-Type: audio/mpeg|x\r\n--xy", "model=a"),
		"--xyz\r\n\r\n--xyz--", "--xyz\r\nContent-Disposition: form-data; name=model\r\n\r\n--xyz--",
	} {
		f.Add(formType, []byte(s))
	}
	f.Add(`multipart/form-data; boundary="x"; charset=utf-8`, []byte("--x\r\nContent-Disposition: form-data; name=model\r\n\r\na\r\n--x--"))
	f.Fuzz(func(t *testing.T, contentType string, body []byte) {
		got, err := scanForm(contentType, body)
		if err != nil {
			return
		}
		boundary, err := formBoundary(contentType)
		if err != nil {
			t.Fatal(err)
		}
		var model, stream []string
		for r := multipart.NewReader(bytes.NewReader(body), boundary); ; {
			p, err := r.NextRawPart()
			if err == io.EOF {
				break
			}
			if err != nil {
				t.Fatalf("accepted, but mime/multipart says %v", err)
			}
			value, err := io.ReadAll(p)
			if err != nil {
				t.Fatal(err)
			}
			switch p.FormName() {
			case "model":
				model = append(model, string(value))
			case "stream":
				stream = append(stream, string(value))
			}
		}
		if len(model) > 1 || len(stream) > 1 || strings.Join(model, "") != got.model || (strings.Join(stream, "") == "true") != got.stream {
			t.Fatalf("mime/multipart has model %q, stream %q; got %+v", model, stream, got)
		}
	})
}

func BenchmarkScanForm(b *testing.B) {
	body := []byte(form("Content-Disposition: form-data; name=file; filename=a|"+strings.Repeat("-\r\n-QUJD", 2<<20), "model=whisper-1"))
	b.SetBytes(int64(len(body)))
	b.ReportAllocs()
	for b.Loop() {
		if _, err := scanForm(formType, body); err != nil {
			b.Fatal(err)
		}
	}
}
