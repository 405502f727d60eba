// This room reads the values of settings: what a size, a time, an address or a
// key must look like, in words that say what to write instead. Whether a value
// may be shown beside those words is for config.go to say.
package main

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"log/slog"
	"net"
	"net/netip"
	"net/url"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"time"
)

func checkListen(s string) error {
	if path, ok := strings.CutPrefix(s, unixPrefix); ok {
		if !filepath.IsAbs(path) || len(path) > 100 || strings.ContainsRune(path, 0) {
			return errors.New("must be unix: followed by an absolute path of at most 100 bytes")
		}
		return nil
	}
	if s == systemdListen {
		return nil
	}
	host, port, err := net.SplitHostPort(s)
	if err != nil {
		return errors.New("must be HOST:PORT, as in 127.0.0.1:8080 or :8080, or unix:/path")
	}
	if n, err := strconv.ParseUint(port, 10, 16); err != nil || n > 65535 {
		return errors.New("has a port that is not a number from 0 to 65535")
	}
	if host != "" && host != "localhost" {
		if _, err := netip.ParseAddr(host); err != nil {
			return errors.New("must name an IP address of this machine, localhost, or nothing for all of them")
		}
	}
	return nil
}

func parseDatabaseURL(s string) (string, error) {
	scheme, rest, ok := strings.Cut(s, ":")
	switch {
	case ok && (scheme == "postgres" || scheme == "postgresql"):
		return "", errors.New("names PostgreSQL, which this binary is built without")
	case !ok || scheme != "sqlite" || strings.TrimPrefix(rest, "//") == "":
		return "", errors.New("must be sqlite:FILE")
	}
	return filepath.Abs(strings.TrimPrefix(rest, "//"))
}

// readSecretFile reads a secret from a file that only its owner should be able
// to read; a trailing newline does not belong to it.
func readSecretFile(name string, to *secret, check func(string) error) error {
	f, err := os.Open(name)
	if err != nil {
		return fmt.Errorf("names a file that cannot be read: %w", pathProblem(err))
	}
	defer f.Close()
	b, err := io.ReadAll(io.LimitReader(f, 4097))
	if err != nil {
		return fmt.Errorf("names a file that cannot be read: %w", pathProblem(err))
	}
	if len(b) > 4096 {
		return errors.New("names a file that is larger than 4 KiB; it must hold the secret alone")
	}
	v := string(bytes.TrimRight(b, "\r\n"))
	if err := check(v); err != nil {
		return fmt.Errorf("names a file whose text %w", err)
	}
	*to = newSecret(v)
	return nil
}

func pathProblem(err error) error {
	if pe, ok := errors.AsType[*fs.PathError](err); ok {
		return pe.Err
	}
	return err
}

func checkManagementToken(s string) error {
	if len(s) < 32 {
		return errors.New("must have 32 characters or more; make one with: openssl rand -hex 32")
	}
	seen := map[rune]bool{}
	for _, r := range s {
		if r <= ' ' || r > '~' {
			return errors.New("must have printable ASCII characters only, without spaces")
		}
		seen[r] = true
	}
	lower := strings.ToLower(s)
	if len(seen) < 10 {
		return errors.New("repeats too few characters to be random; make one with: openssl rand -hex 32")
	}
	for _, sample := range []string{"changeme", "change-me", "change_me", "your-", "your_", "example", "placeholder", "secret-token", "management-token"} {
		if strings.Contains(lower, sample) {
			return errors.New("looks like a sample from documentation; make one with: openssl rand -hex 32")
		}
	}
	return nil
}

// checkProviderKey refuses what cannot be a provider's key, and above all the
// masked form in which a key is shown.
func checkProviderKey(s string) error {
	switch {
	case strings.ContainsAny(s, "*…") || strings.Contains(s, "...") || s == hiddenSecret:
		return errors.New("is a masked key; give the whole key")
	case len(s) < 8 || len(s) > 4096:
		return errors.New("must have 8 to 4096 characters")
	}
	for _, r := range s {
		if r <= ' ' || r > '~' {
			return errors.New("must have printable ASCII characters only, without spaces")
		}
	}
	return nil
}

func parseBool(s string) (bool, error) {
	if err := oneOf(s, "true", "false"); err != nil {
		return false, err
	}
	return s == "true", nil
}

func oneOf(s string, allowed ...string) error {
	if slices.Contains(allowed, s) {
		return nil
	}
	return fmt.Errorf("must be one of: %s", strings.Join(allowed, ", "))
}

func parseLevel(s string) (slog.Level, error) {
	var l slog.Level
	if err := oneOf(s, "debug", "info", "warn", "error"); err != nil {
		return l, err
	}
	return l, l.UnmarshalText([]byte(s))
}

func parsePublicURL(s string) (*url.URL, error) {
	u, err := url.Parse(s)
	if err != nil || (u.Scheme != "https" && u.Scheme != "http") || u.Host == "" || u.User != nil ||
		strings.Trim(u.Path, "/") != "" || u.RawQuery != "" || u.Fragment != "" {
		return nil, errors.New("must be a scheme and a host, as in https://llm.example.com")
	}
	return u, nil
}

// parseMode reads the permissions of a file.
func parseMode(s string) (fs.FileMode, error) {
	n, err := strconv.ParseUint(s, 8, 32)
	if err != nil || n > 0o777 || n&0o600 != 0o600 {
		return 0, errors.New("must be octal permissions that let the owner read and write, as in 0660")
	}
	return fs.FileMode(n), nil
}

// parseTrusted reads a list of networks, in which unix stands for the socket.
func parseTrusted(s string) (socket bool, nets []netip.Prefix, err error) {
	var rest []string
	for item := range strings.SplitSeq(s, ",") {
		if strings.TrimSpace(item) == "unix" {
			socket = true
		} else {
			rest = append(rest, item)
		}
	}
	if len(rest) > 0 {
		nets, err = parsePrefixes(strings.Join(rest, ","))
	}
	return socket, nets, err
}

func parsePrefixes(s string) ([]netip.Prefix, error) {
	var out []netip.Prefix
	for item := range strings.SplitSeq(s, ",") {
		item = strings.TrimSpace(item)
		if addr, err := netip.ParseAddr(item); err == nil {
			out = append(out, netip.PrefixFrom(addr.Unmap(), addr.Unmap().BitLen()))
			continue
		}
		p, err := netip.ParsePrefix(item)
		if err != nil || p != p.Masked() {
			return nil, fmt.Errorf("must list addresses or networks such as 10.0.0.0/8; %q is neither", item)
		}
		out = append(out, p)
	}
	return out, nil
}

// parseSize reads a size in bytes with one of the units B, KiB, MiB and GiB.
func parseSize(s string, least, most int64) (int64, error) {
	units := []struct {
		name string
		size int64
	}{{"KiB", 1 << 10}, {"MiB", 1 << 20}, {"GiB", 1 << 30}, {"B", 1}, {"", 1}}
	for _, u := range units {
		digits, ok := strings.CutSuffix(s, u.name)
		if !ok {
			continue
		}
		n, err := strconv.ParseInt(digits, 10, 64)
		if err != nil {
			break
		}
		if n < (least+u.size-1)/u.size || n > most/u.size {
			return 0, fmt.Errorf("must be from %s to %s", formatSize(least), formatSize(most))
		}
		return n * u.size, nil
	}
	return 0, errors.New("must be a whole number of bytes, KiB, MiB or GiB, as in 32MiB")
}

// parseCount reads a whole number.
func parseCount(s string, least, most int64) (int64, error) {
	n, err := strconv.ParseInt(s, 10, 64)
	if err != nil || n < least || n > most {
		return 0, fmt.Errorf("must be a whole number from %d to %d", least, most)
	}
	return n, nil
}

func formatSize(n int64) string {
	for _, u := range []struct {
		name string
		size int64
	}{{"GiB", 1 << 30}, {"MiB", 1 << 20}, {"KiB", 1 << 10}} {
		if n >= u.size && n%u.size == 0 {
			return strconv.FormatInt(n/u.size, 10) + u.name
		}
	}
	return strconv.FormatInt(n, 10) + "B"
}

// formatSpan writes a duration as parseSpan reads it.
func formatSpan(d time.Duration) string {
	const day = 24 * time.Hour
	switch {
	case d >= 2*day && d%day == 0:
		return strconv.FormatInt(int64(d/day), 10) + "d"
	case d >= time.Hour && d%time.Hour == 0:
		return strconv.FormatInt(int64(d/time.Hour), 10) + "h"
	}
	return d.String()
}

// parseSpan reads a duration in Go's form, or in whole days as in 90d.
func parseSpan(s string, least, most time.Duration) (time.Duration, error) {
	var d time.Duration
	if digits, ok := strings.CutSuffix(s, "d"); ok {
		n, err := strconv.ParseUint(digits, 10, 16)
		if err != nil {
			return 0, errors.New("must be a duration with a unit, as in 30s, 5m, 2h or 90d")
		}
		d = time.Duration(n) * 24 * time.Hour
	} else {
		var err error
		if d, err = time.ParseDuration(s); err != nil {
			return 0, errors.New("must be a duration with a unit, as in 30s, 5m, 2h or 90d")
		}
	}
	if d < least || d > most {
		return 0, fmt.Errorf("must be from %s to %s", formatSpan(least), formatSpan(most))
	}
	return d, nil
}
