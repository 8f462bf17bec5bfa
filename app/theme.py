"""The page's colours and fonts: warm greys and one ink blue, fonts of the system, so that nothing is fetched."""

import gradio as gr


def build_theme() -> gr.themes.Base:
    """Warm greys and one ink blue; fonts of the system, so that nothing is fetched."""
    stone = gr.themes.Color(
        "#fafaf8", "#f3f2ee", "#e6e4de", "#d3d0c8", "#a8a49a", "#7b776e", "#5b584f", "#45423b", "#2a2824", "#1c1b18",
        "#121110", name="stone",
    )  # fmt: skip
    ink = gr.themes.Color(
        "#eef3f7", "#dbe6ee", "#b9cedd", "#8eb0c7", "#5d8cab", "#3f7190", "#2f5a76", "#264961", "#1f3b4f", "#172c3b",
        "#0f1e29", name="ink",
    )  # fmt: skip
    sans = ["system-ui", "-apple-system", "Segoe UI", "Roboto", "sans-serif"]
    theme = gr.themes.Base(
        primary_hue=ink, secondary_hue=ink, neutral_hue=stone, font=sans,
        font_mono=["ui-monospace", "SFMono-Regular", "Consolas", "monospace"], radius_size="md",
    )  # fmt: skip
    return theme.set(
        body_background_fill="*neutral_50",
        body_background_fill_dark="*neutral_950",
        body_text_color_subdued="*neutral_600",
        body_text_color_subdued_dark="*neutral_400",
        block_background_fill="white",
        block_background_fill_dark="*neutral_900",
        block_border_color="*neutral_200",
        block_border_color_dark="*neutral_800",
        block_shadow="none",
        block_label_background_fill="*block_background_fill",
        block_label_background_fill_dark="*block_background_fill",
        block_label_border_width="0px",
        block_label_text_color="*neutral_600",
        block_label_text_color_dark="*neutral_400",
        block_title_text_color="*neutral_700",
        block_title_text_color_dark="*neutral_300",
        block_info_text_color="*neutral_600",
        block_info_text_color_dark="*neutral_400",
        button_primary_background_fill="*primary_600",
        button_primary_background_fill_hover="*primary_700",
        button_primary_background_fill_dark="*primary_500",
        button_primary_background_fill_hover_dark="*primary_600",
        button_primary_text_color="white",
        button_secondary_background_fill="*neutral_100",
        button_secondary_background_fill_hover="*neutral_200",
        button_secondary_background_fill_dark="*neutral_800",
        button_secondary_background_fill_hover_dark="*neutral_700",
        button_large_text_size="*text_md",
        button_large_text_weight="600",
        slider_color="*primary_500",
    )
